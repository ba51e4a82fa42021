// Package libtpms binds the TPM in libtpms.so.0 (0.9 and newer) without cgo.
//
// The library has one TPM a process, in static variables: there is one Lib at
// a time, and its methods other than Cancel and SetLocality are called by one
// goroutine after another. It calls back for what it stores (Callbacks), on the
// goroutine that called it.
//
// Interface: libtpms/tpm_library.h, tpm_tis.h, tpm_memory.h.
package libtpms

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"github.com/ebitengine/purego"
)

// Soname is what is loaded unless Open is told otherwise.
const Soname = "libtpms.so.0"

// ErrMissing: the library, or a function of it, isn't there.
var ErrMissing = errors.New("libtpms can't be loaded")

// A Result is a TPM_RESULT (libtpms/tpm_error.h), or a TPM_RC.
type Result uint32

// Results that are given to libtpms, or on its behalf.
const (
	Success      Result = 0
	BadParameter Result = 3
	Fail         Result = 9
	BadOrdinal   Result = 10
	KeyNotFound  Result = 13
	Size         Result = 23
	IOError      Result = 31
	BadLocality  Result = 61
	Retry        Result = 0x800 // of a load: there is no such state
)

// Error makes an error of a result, or nil of Success.
func (r Result) Error() string { return fmt.Sprintf("libtpms: result %#x", uint32(r)) }

// Callbacks are what the library needs of its host. Names are "permall",
// "volatilestate" and "savestate".
type Callbacks struct {
	// Load returns Success and the bytes, Retry where there are none, or
	// another result, with which the TPM doesn't start.
	Load func(name string) ([]byte, Result)
	// Store must have made the bytes durable when it returns Success. Any
	// other result puts the TPM into failure mode.
	Store func(name string, data []byte) Result
	// Delete removes what may not be there.
	Delete func(name string) Result
}

// maxStored bounds what the library hands over in one call.
const maxStored = 1 << 20

// Lib is the loaded library.
type Lib struct {
	cb Callbacks

	// Buffers that the library fills. They are fields, since their addresses
	// are passed, and it is the heap that stays where it is.
	ptr        *byte
	size, room uint32
	lo, hi     uint32
	flag       byte

	// The address of process(buf **byte, size, room *uint32, cmd *byte, n
	// uint32) uint32: purego calls it by that in half the time that it takes for
	// a func, and a short command is a few of those.
	process uintptr

	getVersion       func() uint32
	choose           func(int32) uint32
	register         func(unsafe.Pointer) uint32
	mainInit         func() uint32
	terminate        func()
	volatileAll      func(buf **byte, n *uint32) uint32
	cancel           func() uint32
	property         func(prop int32, result *int32) uint32
	getInfo          func(flags uint32) *byte
	setDebugFD       func(int32)
	setDebugLevel    func(uint32)
	setBufferSize    func(want uint32, lo, hi *uint32) uint32
	validateState    func(kind, flags uint32) uint32
	setState         func(kind uint32, p *byte, n uint32) uint32
	getState         func(kind uint32, buf **byte, n *uint32) uint32
	hashStart        func() uint32
	hashData         func(p *byte, n uint32) uint32
	hashEnd          func() uint32
	established      func(bit *byte) uint32
	resetEstablished func() uint32
	setProfile       func(p *byte) uint32
	malloc           func(n uintptr) unsafe.Pointer
	free             func(p unsafe.Pointer)
}

var loaded atomic.Pointer[Lib]

// Open loads the library from path ("" is Soname). Its callbacks go to cb.
func Open(path string, cb Callbacks) (*Lib, error) {
	if path == "" {
		path = Soname
	}
	h, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	l := &Lib{cb: cb}
	if err := l.bind(h); err != nil {
		return nil, err
	}
	if !loaded.CompareAndSwap(nil, l) {
		return nil, errors.New("libtpms is in use: it has one TPM a process")
	}
	if r := Result(l.register(unsafe.Pointer(callbackTable()))); r != Success {
		return nil, fmt.Errorf("TPMLIB_RegisterCallbacks: %w", r)
	}
	return l, nil
}

// bind looks up every function, and says which is missing.
func (l *Lib) bind(h uintptr) error {
	for name, fn := range map[string]any{
		"TPMLIB_GetVersion": &l.getVersion, "TPMLIB_ChooseTPMVersion": &l.choose,
		"TPMLIB_RegisterCallbacks": &l.register, "TPMLIB_MainInit": &l.mainInit,
		"TPMLIB_Terminate": &l.terminate, "TPMLIB_Process": &l.process,
		"TPMLIB_VolatileAll_Store": &l.volatileAll, "TPMLIB_CancelCommand": &l.cancel,
		"TPMLIB_GetTPMProperty": &l.property, "TPMLIB_GetInfo": &l.getInfo,
		"TPMLIB_SetDebugFD": &l.setDebugFD, "TPMLIB_SetDebugLevel": &l.setDebugLevel,
		"TPMLIB_SetBufferSize": &l.setBufferSize, "TPMLIB_ValidateState": &l.validateState,
		"TPMLIB_SetState": &l.setState, "TPMLIB_GetState": &l.getState,
		"TPM_IO_Hash_Start": &l.hashStart, "TPM_IO_Hash_Data": &l.hashData, "TPM_IO_Hash_End": &l.hashEnd,
		"TPM_IO_TpmEstablished_Get": &l.established, "TPM_IO_TpmEstablished_Reset": &l.resetEstablished,
	} {
		sym, err := purego.Dlsym(h, name)
		if err != nil {
			return fmt.Errorf("%w: version 0.9 or newer is needed: %w", ErrMissing, err)
		}
		if at, ok := fn.(*uintptr); ok {
			*at = sym
			continue
		}
		purego.RegisterFunc(fn, sym)
	}
	if sym, err := purego.Dlsym(h, "TPMLIB_SetProfile"); err == nil { // since 0.10
		purego.RegisterFunc(&l.setProfile, sym)
	}
	// libtpms frees what it is given, and gives what is to be freed. Not
	// TPM_Malloc: it refuses more than 128 KiB, and a full state is larger.
	c, err := purego.Dlopen("libc.so.6", purego.RTLD_NOW)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMissing, err)
	}
	purego.RegisterLibFunc(&l.malloc, c, "malloc")
	purego.RegisterLibFunc(&l.free, c, "free")
	return nil
}

// Version returns the library's version, such as "0.9.2".
func (l *Lib) Version() string {
	v := l.getVersion()
	return fmt.Sprintf("%d.%d.%d", v>>16, v>>8&0xff, v&0xff)
}

// Choose selects TPM 2.0, or 1.2. It is called before Start.
func (l *Lib) Choose(tpm2 bool) Result {
	if tpm2 {
		return Result(l.choose(1))
	}
	return Result(l.choose(0))
}

// Start powers the TPM on (TPMLIB_MainInit). Where there is no permanent
// state, it manufactures one.
func (l *Lib) Start() Result { return Result(l.mainInit()) }

// Stop powers it off.
func (l *Lib) Stop() { l.terminate() }

// Process executes one command and returns the response.
func (l *Lib) Process(cmd []byte) ([]byte, Result) {
	if len(cmd) == 0 {
		return nil, BadParameter
	}
	l.size = 0
	code, _, _ := purego.SyscallN(l.process, uintptr(unsafe.Pointer(&l.ptr)), uintptr(unsafe.Pointer(&l.size)),
		uintptr(unsafe.Pointer(&l.room)), uintptr(unsafe.Pointer(&cmd[0])), uintptr(len(cmd)))
	if r := Result(code); r != Success || l.ptr == nil {
		return nil, r
	}
	return clone(l.ptr, l.size), Success // the buffer is the library's next one
}

// take copies what the library allocated, and frees it.
func (l *Lib) take(r uint32, p *byte, n uint32) ([]byte, Result) {
	if p != nil {
		defer l.free(unsafe.Pointer(p))
	}
	if r != 0 || p == nil {
		return nil, Result(r)
	}
	return clone(p, n), Success
}

func clone(p *byte, n uint32) []byte {
	if n > maxStored {
		n = maxStored
	}
	return append([]byte{}, unsafe.Slice(p, n)...)
}

// State kinds of State and SetState: the bits of TPMLIB_StateType.
const (
	Permanent uint32 = 1 << iota
	Volatile
	Savestate
)

// State returns the TPM's state as it is in memory, or, of a TPM that is off,
// as it will start with. It is nil where there is none.
func (l *Lib) State(kind uint32) ([]byte, Result) {
	out := new(struct {
		p *byte
		n uint32
	})
	r := l.getState(kind, &out.p, &out.n)
	return l.take(r, out.p, out.n)
}

// SetState hands over a state for the next Start to begin with. An empty one
// means that there is none. The permanent state comes first.
func (l *Lib) SetState(kind uint32, p []byte) Result {
	var first *byte
	if len(p) > 0 {
		first = &p[0]
	}
	r := l.setState(kind, first, uint32(len(p)))
	runtime.KeepAlive(p)
	return Result(r)
}

// Validate checks the states of the kinds named, as far as the library can.
func (l *Lib) Validate(kinds uint32) Result { return Result(l.validateState(kinds, 0)) }

// Cancel asks the command that runs to give up. It may be called at any time.
func (l *Lib) Cancel() Result { return Result(l.cancel()) }

// BufferSize sets the size of commands and responses, or returns it where want
// is 0, and says what is possible.
func (l *Lib) BufferSize(want uint32) (size, least, most uint32) {
	size = l.setBufferSize(want, &l.lo, &l.hi)
	return size, l.lo, l.hi
}

// MaxBuffer is the largest command, in bytes (TPMPROP_TPM2_BUFFER_MAX,
// TPMPROP_TPM_BUFFER_MAX).
func (l *Lib) MaxBuffer(tpm2 bool) int {
	prop, out := int32(2), new(int32)
	if tpm2 {
		prop = 16
	}
	if l.property(prop, out) != 0 || *out < 1024 || *out > 1<<16 {
		return 4096
	}
	return int(*out)
}

// Info returns JSON that describes the TPM, for the bits of TPMLIB_InfoFlags.
func (l *Lib) Info(flags uint32) string {
	p := l.getInfo(flags)
	if p == nil {
		return ""
	}
	defer l.free(unsafe.Pointer(p))
	return cString(p)
}

// HashStart, HashData and HashEnd measure what starts the machine
// (_TPM_Hash_Start and so on, locality 4).
func (l *Lib) HashStart() Result { return Result(l.hashStart()) }

// HashData is the second of the three.
func (l *Lib) HashData(p []byte) Result {
	if len(p) == 0 {
		return Success
	}
	return Result(l.hashData(&p[0], uint32(len(p))))
}

// HashEnd is the third.
func (l *Lib) HashEnd() Result { return Result(l.hashEnd()) }

// Established returns the tpmEstablished bit.
func (l *Lib) Established() (bool, Result) {
	r := l.established(&l.flag)
	return l.flag != 0, Result(r)
}

// ResetEstablished clears it, which takes locality 3 or 4.
func (l *Lib) ResetEstablished() Result { return Result(l.resetEstablished()) }

// Debug lets the library log to w's file descriptor, from level 1.
func (l *Lib) Debug(fd int, level uint32) {
	l.setDebugFD(int32(fd))
	l.setDebugLevel(level)
}

// SetProfile sets the profile that a TPM 2.0 is manufactured with. Libraries
// before 0.10 have none.
func (l *Lib) SetProfile(json string) error {
	if l.setProfile == nil {
		return errors.New("libtpms before 0.10 has no profiles")
	}
	p := append([]byte(json), 0)
	if r := Result(l.setProfile(&p[0])); r != Success {
		return r
	}
	return nil
}

func cString(p *byte) string {
	const most = 1 << 20
	for n := range most {
		if *(*byte)(unsafe.Add(unsafe.Pointer(p), n)) == 0 {
			return string(unsafe.Slice(p, n))
		}
	}
	return ""
}
