package libtpms

import (
	"sync/atomic"
	"unsafe"

	"github.com/ebitengine/purego"
)

// table is struct libtpms_callbacks. There is no callback for physical
// presence: nobody presses a button on an emulated TPM, and software asserts it
// by command.
type table struct {
	size                               int32
	init, load, store, remove          uintptr
	ioInit, locality, physicalPresence uintptr
}

// callbackTable is made once: callbacks can't be given back.
func callbackTable() *table {
	t := &table{
		init:     purego.NewCallback(func() uintptr { return 0 }),
		load:     purego.NewCallback(onLoad),
		store:    purego.NewCallback(onStore),
		remove:   purego.NewCallback(onDelete),
		ioInit:   purego.NewCallback(func() uintptr { return 0 }),
		locality: localityCallback(),
	}
	t.size = int32(unsafe.Sizeof(*t))
	return t
}

func onLoad(data **byte, length *uint32, _ uint32, name *byte) uintptr {
	*data, *length = nil, 0
	l := loaded.Load()
	p, r := l.cb.Load(cString(name))
	if r != Success {
		return uintptr(r)
	}
	if len(p) == 0 || len(p) > maxStored {
		return uintptr(Fail)
	}
	c := l.malloc(uintptr(len(p)))
	if c == nil {
		return uintptr(Size)
	}
	copy(unsafe.Slice((*byte)(c), len(p)), p)
	*data, *length = (*byte)(c), uint32(len(p))
	return 0
}

func onStore(data *byte, length uint32, _ uint32, name *byte) uintptr {
	if length > maxStored || data == nil {
		return uintptr(Size)
	}
	return uintptr(loaded.Load().cb.Store(cString(name), clone(data, length)))
}

func onDelete(_ uint32, name *byte, _ byte) uintptr {
	return uintptr(loaded.Load().cb.Delete(cString(name)))
}

// locality is what libtpms is told of the command that it executes.
var locality uint32

// SetLocality says which locality, 0 to 4, the commands come from that follow,
// and returns the one of those before. It may be called at any time.
func (l *Lib) SetLocality(to byte) (before byte) {
	return byte(atomic.SwapUint32(&locality, uint32(to)))
}
