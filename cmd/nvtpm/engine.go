package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"nvstore.dev/cmd/nvtpm/internal/libtpms"
	"nvstore.dev/cmd/nvtpm/internal/live"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/control"
	"nvstore.dev/tpmstate/swtpm"
)

// TPM ordinals that the engine sends itself, or looks for (TPM 2.0 Library,
// part 2, 6.5.2; TPM 1.2 Main, part 2, 17).
const (
	ccShutdown  = 0x145
	ccStartup   = 0x144
	ordStartup  = 0x99
	rcInit      = 0x100 // TPM_RC_INITIALIZE
	rcFailure   = 0x101 // TPM_RC_FAILURE
	stNoSession = 0x8001
	stSessions  = 0x8002
	headerLen   = 10
)

// An engine is the TPM: libtpms, and the home that its state has. The library
// has one TPM and no locks: one call runs at a time.
type engine struct {
	tpm2           bool
	autoShutdown   bool
	refuseLoc4     bool
	allowPlain     bool // plain state may come and go although the home is sealed
	laterHome      bool // during an incoming migration the other host still has the store
	releaseOnLeave bool // an outgoing one takes it along
	keys           swtpm.MigrationKeys
	profile        string
	log            *logger

	lib  *libtpms.Lib
	call sync.Mutex // held during each

	running  atomic.Bool
	last     uint32 // ordinal of the last command
	incoming *tpmstate.State
	started  bool // once, so that a profile isn't set again

	commands sync.Mutex // one at a time, until its state is durable

	homeMu   sync.Mutex
	openHome func() (*place, error)
	home     *place
	left     bool // with a migration; the TPM does nothing more here
	closed   bool

	onData func(*os.File) bool
}

var _ control.TPM = (*engine)(nil)

// start loads the library.
func (e *engine) start(library string) error {
	lib, err := libtpms.Open(library, libtpms.Callbacks{
		Load: e.load, Store: e.store, Delete: e.remove,
	})
	if err != nil {
		return err
	}
	if r := lib.Choose(e.tpm2); r != libtpms.Success {
		return fmt.Errorf("this libtpms has no TPM %s: %w", versionOf(e.tpm2), r)
	}
	e.lib = lib
	return nil
}

// do runs fn, which calls the library.
func (e *engine) do(fn func()) {
	e.call.Lock()
	defer e.call.Unlock()
	fn()
}

func (e *engine) result(fn func() libtpms.Result) control.Result {
	var r libtpms.Result
	e.do(func() { r = fn() })
	return control.Result(r)
}

// storage returns the home, which is opened when it is first needed: during an
// incoming migration the other host still has it.
func (e *engine) storage() (tpmstate.Home, error) {
	e.homeMu.Lock()
	defer e.homeMu.Unlock()
	if e.home != nil {
		return e.home, nil
	}
	if e.closed {
		return nil, os.ErrClosed
	}
	h, err := e.openHome()
	if err != nil {
		e.log.printf("error: the TPM's state can't be opened: %v", err)
		return nil, err
	}
	e.home = h
	return h, nil
}

// leave gives the home away with a state that was asked for: a migration may take
// it along. One behind a running QEMU is kept, and lets go of what QEMU has.
func (e *engine) leave() {
	e.do(func() { e.left = true })
	if l := e.behind(); l != nil {
		l.Leave()
		return
	}
	if err := e.release(); err != nil {
		e.log.printf("error: releasing the TPM's state: %v", err)
	}
}

// release gives the home to whoever comes next.
func (e *engine) release() error {
	e.homeMu.Lock()
	h := e.home
	e.home = nil
	e.homeMu.Unlock()
	if h == nil {
		return nil
	}
	return h.Close() // which may wait for the library
}

// behind returns the home behind a running QEMU, or nil.
func (e *engine) behind() *live.Home {
	e.homeMu.Lock()
	defer e.homeMu.Unlock()
	if e.home == nil {
		return nil
	}
	return e.home.live
}

// reload starts the TPM anew, from another state than the one it was started
// from. No command ran in between.
func (e *engine) reload() {
	e.do(func() {
		if !e.running.Load() {
			return
		}
		e.lib.Stop()
		if r := e.lib.Start(); r != libtpms.Success {
			e.log.printf("error: the TPM doesn't start: %v", r)
			e.running.Store(false)
			e.lib.Stop()
		}
	})
}

// load, store and remove are what libtpms calls.
func (e *engine) load(name string) ([]byte, libtpms.Result) {
	k, ok := tpmstate.ByLibraryName(name)
	if !ok {
		return nil, libtpms.Fail
	}
	h, err := e.storage()
	if err != nil {
		return nil, libtpms.Fail
	}
	p, err := h.Load(k)
	if errors.Is(err, tpmstate.ErrNotFound) {
		return nil, libtpms.Retry
	}
	if err != nil {
		e.log.printf("error: the %s state can't be loaded: %v", k, err)
		return nil, libtpms.Fail
	}
	return p, libtpms.Success
}

func (e *engine) store(name string, data []byte) libtpms.Result {
	k, ok := tpmstate.ByLibraryName(name)
	if !ok {
		return libtpms.Fail
	}
	h, err := e.storage()
	if err == nil {
		err = h.Store(k, data)
	}
	if err != nil {
		e.log.printf("error: the %s state can't be stored, and the TPM goes into failure mode: %v", k, err)
		return libtpms.Fail
	}
	e.log.debugf("stored the %s state, %d bytes", k, len(data))
	return libtpms.Success
}

func (e *engine) remove(name string) libtpms.Result {
	k, ok := tpmstate.ByLibraryName(name)
	if !ok {
		return libtpms.Fail
	}
	h, err := e.storage()
	if err == nil {
		err = h.Delete(k)
	}
	if err != nil {
		e.log.printf("error: the %s state can't be removed: %v", k, err)
		return libtpms.Fail
	}
	return libtpms.Success
}

// Start is control.TPM's.
func (e *engine) Start(deleteVolatile bool) control.Result {
	return e.result(func() libtpms.Result { return e.powerOn(deleteVolatile) })
}

func (e *engine) powerOn(deleteVolatile bool) libtpms.Result {
	e.powerOff()
	h, err := e.storage()
	if err != nil {
		return libtpms.Fail
	}
	e.left = false
	if l := e.behind(); l != nil {
		l.Restart()
	}
	if e.incoming != nil {
		// What a migration or a snapshot brings is the truth. It is stored
		// before the TPM runs on it, and what was there before is gone.
		s := *e.incoming
		s[tpmstate.Volatile] = nil // the library has it, and it is for this start
		if err := h.Replace(s); err != nil {
			e.log.printf("error: the state that was handed over can't be stored: %v", err)
			return libtpms.Fail
		}
		e.incoming = nil
	}
	if e.profile != "" && !e.started {
		if err := e.lib.SetProfile(e.profile); err != nil {
			e.log.printf("error: profile: %v", err)
			return libtpms.Fail
		}
	}
	if r := e.lib.Start(); r != libtpms.Success {
		e.log.printf("error: the TPM doesn't start: %v", r)
		e.lib.Stop()
		return r
	}
	if deleteVolatile {
		if err := h.Delete(tpmstate.Volatile); err != nil {
			e.log.printf("error: the volatile state can't be removed: %v", err)
			e.lib.Stop()
			return libtpms.Fail
		}
	}
	e.started = true
	e.last = 0
	e.running.Store(true)
	return libtpms.Success
}

// powerOff stops the TPM. One that its machine didn't shut down is shut down
// first, so that it doesn't count as an attack on its lockout.
func (e *engine) powerOff() {
	if !e.running.Load() {
		return
	}
	if e.autoShutdown && e.tpm2 && e.last != ccShutdown && !e.left {
		if l := e.behind(); l != nil {
			l.Mark() // nobody waits for it
		}
		for _, typ := range []uint16{1, 0} { // state, else clear
			rsp, r := e.lib.Process(command(stNoSession, ccShutdown, typ))
			if r == libtpms.Success && len(rsp) >= headerLen {
				if code := binary.BigEndian.Uint32(rsp[6:]); code == 0 || code == rcInit {
					break
				}
			}
		}
	}
	e.running.Store(false)
	e.lib.Stop()
}

// Stop is control.TPM's.
func (e *engine) Stop() { e.do(e.powerOff) }

// Running is control.TPM's.
func (e *engine) Running() bool { return e.running.Load() }

// command makes a command with one parameter of two bytes.
func command(tag uint16, ordinal uint32, param uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, tag)
	b = binary.BigEndian.AppendUint32(b, headerLen+2)
	b = binary.BigEndian.AppendUint32(b, ordinal)
	return binary.BigEndian.AppendUint16(b, param)
}

// startup sends TPM2_Startup or TPM_Startup.
func (e *engine) startup(typ startupType) error {
	cmd := command(0xc1, ordStartup, uint16(typ))
	if e.tpm2 {
		if typ == startupDeactivated {
			return errors.New("a TPM 2.0 has no startup-deactivated")
		}
		cmd = command(stNoSession, ccStartup, uint16(typ-startupClear))
	}
	rsp := e.process(cmd, nil)
	if code := binary.BigEndian.Uint32(rsp[6:]); code != 0 && code != rcInit {
		return fmt.Errorf("the startup command failed with %#x", code)
	}
	return nil
}

// process executes a command, and returns a response whatever happens.
// locality, if not nil, is that of this command and of those after it.
func (e *engine) process(cmd []byte, locality *byte) []byte {
	e.commands.Lock()
	defer e.commands.Unlock()
	l := e.behind()
	if l == nil || !e.running.Load() {
		return e.execute(cmd, locality)
	}
	// Waiting is done here, and not while the library is held: the control
	// channel is to be answered.
	if err := l.Ready(); err != nil {
		return e.late(err)
	}
	rsp := e.execute(cmd, locality)
	if err := l.Durable(); err != nil {
		return e.late(err)
	}
	return rsp
}

// late is the response when the state can't be stored: try again
// (TPM_RC_RETRY, TPM_RETRY), or a failure.
func (e *engine) late(err error) []byte {
	if errors.Is(err, live.ErrBusy) {
		return e.failure(0x922, 0x800)
	}
	return e.failure(rcFailure, uint32(libtpms.Fail))
}

// execute has the TPM execute a command.
func (e *engine) execute(cmd []byte, locality *byte) []byte {
	var rsp []byte
	e.do(func() {
		if locality != nil {
			if *locality > 4 || *locality == 4 && e.refuseLoc4 {
				rsp = e.failure(0x907, uint32(control.BadLocality)) // TPM_RC_LOCALITY
				return
			}
			e.lib.SetLocality(*locality)
		}
		if !e.running.Load() {
			rsp = e.failure(rcFailure, uint32(libtpms.Fail))
			return
		}
		e.left = false // or it came back
		if len(cmd) >= headerLen {
			e.last = binary.BigEndian.Uint32(cmd[6:])
		}
		if _, err := e.storage(); err != nil {
			rsp = e.failure(rcFailure, uint32(libtpms.Fail))
			return
		}
		var r libtpms.Result
		if rsp, r = e.lib.Process(cmd); r != libtpms.Success || len(rsp) < headerLen {
			e.log.printf("error: libtpms gave no response: %v", r)
			rsp = e.failure(rcFailure, uint32(libtpms.Fail))
		}
		e.log.debugf("command %#x: response code %#x", e.last, binary.BigEndian.Uint32(rsp[6:]))
	})
	return rsp
}

// failure makes a response of a header and a code.
func (e *engine) failure(tpm2, tpm12 uint32) []byte {
	tag, code := uint16(0xc4), tpm12
	if e.tpm2 {
		tag, code = stNoSession, tpm2
	}
	b := binary.BigEndian.AppendUint16(nil, tag)
	b = binary.BigEndian.AppendUint32(b, headerLen)
	return binary.BigEndian.AppendUint32(b, code)
}

func versionOf(tpm2 bool) tpmstate.Version {
	if tpm2 {
		return tpmstate.TPM20
	}
	return tpmstate.TPM12
}
