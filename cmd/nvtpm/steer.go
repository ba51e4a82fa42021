package main

import (
	"errors"
	"os"

	"nvstore.dev/cmd/nvtpm/internal/libtpms"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/control"
	"nvstore.dev/tpmstate/swtpm"
)

// What the control channel asks of the engine, apart from power.

// Established is control.TPM's.
func (e *engine) Established() (bit bool, r control.Result) {
	r = e.result(func() (r libtpms.Result) {
		bit, r = e.lib.Established()
		return r
	})
	return bit, r
}

// ResetEstablished is control.TPM's.
func (e *engine) ResetEstablished(locality byte) control.Result {
	if locality > 4 {
		return control.BadLocality
	}
	return e.result(func() libtpms.Result {
		defer e.lib.SetLocality(e.lib.SetLocality(locality))
		return e.lib.ResetEstablished()
	})
}

// SetLocality is control.TPM's.
func (e *engine) SetLocality(locality byte) control.Result {
	if locality > 4 || locality == 4 && e.refuseLoc4 {
		return control.BadLocality
	}
	e.lib.SetLocality(locality)
	return control.Success
}

// HashStart is control.TPM's.
func (e *engine) HashStart() control.Result { return e.result(e.lib.HashStart) }

// HashData is control.TPM's.
func (e *engine) HashData(p []byte) control.Result {
	return e.result(func() libtpms.Result { return e.lib.HashData(p) })
}

// HashEnd is control.TPM's.
func (e *engine) HashEnd() control.Result { return e.result(e.lib.HashEnd) }

// Cancel is control.TPM's. It goes past the command that runs.
func (e *engine) Cancel() control.Result { return control.Result(e.lib.Cancel()) }

// StoreVolatile is control.TPM's.
func (e *engine) StoreVolatile() control.Result {
	return e.result(func() libtpms.Result {
		p, r := e.lib.State(libtpms.Volatile)
		if r != libtpms.Success {
			return r
		}
		return e.store(tpmstate.Volatile.LibraryName(), p)
	})
}

// LockStorage is control.TPM's.
func (e *engine) LockStorage(uint32) control.Result {
	if _, err := e.storage(); err != nil {
		return control.Fail
	}
	return control.Success
}

// State is control.TPM's. The TPM's own memory answers, never the home: QEMU
// may ask while the image that the home lies in stands still.
func (e *engine) State(k tpmstate.Kind, decrypted bool) (blob []byte, encrypted bool, r control.Result) {
	var state []byte
	r = e.result(func() (r libtpms.Result) {
		state, r = e.lib.State(1 << k)
		return r
	})
	if r != control.Success && r != control.Result(libtpms.Retry) {
		return nil, false, r
	}
	if k == tpmstate.Savestate && e.releaseOnLeave {
		e.leave()
	}
	if len(state) == 0 {
		return nil, false, control.Success
	}
	keys, sealed := e.wrapping()
	if sealed && keys.Migration == nil {
		e.log.printf("error: the %s state can't be wrapped: the store's key for that wasn't read yet", k)
		return nil, false, control.KeyNotFound
	}
	if decrypted {
		keys.File = nil
	}
	blob, err := swtpm.SealBlob(state, keys)
	if err != nil {
		e.log.printf("error: wrapping the %s state: %v", k, err)
		return nil, false, control.Fail
	}
	return blob, keys.File != nil, control.Success
}

// wrapping returns the keys of blobs that are handed out. Where the store is
// sealed and there is no migration key, it has one of its own: it comes along
// when the store does, and keeps the TPM's secrets out of snapshots and
// migration streams. sealed tells that nothing may be in clear.
func (e *engine) wrapping() (keys swtpm.MigrationKeys, sealed bool) {
	e.homeMu.Lock()
	defer e.homeMu.Unlock()
	keys = e.keys
	if e.home == nil || !e.home.sealed || e.allowPlain {
		return keys, false
	}
	if keys.Migration == nil {
		keys.Migration = e.home.key()
	}
	return keys, true
}

// SetState is control.TPM's. The blobs become the TPM's at its next start.
func (e *engine) SetState(k tpmstate.Kind, blob []byte, encrypted bool) control.Result {
	if _, err := e.storage(); err != nil {
		return control.IOError
	}
	var state []byte
	if len(blob) > 0 {
		var r control.Result
		if state, r = e.unwrap(k, blob, encrypted); r != control.Success {
			return r
		}
	}
	r := e.result(func() libtpms.Result { return e.lib.SetState(1<<k, state) })
	if r != control.Success {
		e.log.printf("error: libtpms refuses the %s state that was handed over: %v", k, libtpms.Result(r))
		e.incoming = nil
		return r
	}
	if e.incoming == nil {
		e.incoming = new(tpmstate.State)
	}
	e.incoming[k] = state
	return control.Success
}

func (e *engine) unwrap(k tpmstate.Kind, blob []byte, encrypted bool) ([]byte, control.Result) {
	keys, sealed := e.wrapping()
	if keys.Migration == nil { // allow-plain takes what is wrapped, too
		keys.Migration = e.ownKey()
	}
	b, err := swtpm.Parse(blob)
	if err == nil && !b.Encrypted() && !encrypted && sealed {
		e.log.printf("error: the %s state that was handed over is in clear, and the store is sealed; give --migration allow-plain to accept it", k)
		return nil, control.KeyNotFound
	}
	var state []byte
	if err == nil {
		state, err = swtpm.OpenBlob(blob, keys)
	}
	switch {
	case err == nil && tpmstate.CheckSize(k, len(state)) == nil:
		return state, control.Success
	case errors.Is(err, swtpm.ErrNoKey):
		e.log.printf("error: the %s state that was handed over: %v", k, err)
		return nil, control.KeyNotFound
	case errors.Is(err, swtpm.ErrKey):
		e.log.printf("error: the %s state that was handed over: %v", k, err)
		return nil, control.DecryptError
	default:
		e.log.printf("error: the %s state that was handed over: %v", k, err)
		return nil, control.BadParameter
	}
}

// BufferSize is control.TPM's.
func (e *engine) BufferSize(want uint32) (size, least, most uint32) {
	e.do(func() { size, least, most = e.lib.BufferSize(want) })
	return
}

// Info is control.TPM's.
func (e *engine) Info(flags uint64) (text string) {
	e.do(func() { text = e.lib.Info(uint32(flags)) })
	return text
}

// Keys is control.TPM's.
func (e *engine) Keys() (file, migration bool) {
	keys, sealed := e.wrapping()
	return keys.File != nil || sealed, keys.Migration != nil
}

// Data is control.TPM's.
func (e *engine) Data(f *os.File) bool { return e.onData(f) }

// close stops the TPM and settles its home.
func (e *engine) close() error {
	e.Stop()
	e.homeMu.Lock()
	e.closed = true
	e.homeMu.Unlock()
	return e.release()
}

func (e *engine) ownKey() *swtpm.Key {
	e.homeMu.Lock()
	defer e.homeMu.Unlock()
	if e.home == nil {
		return nil
	}
	return e.home.key()
}
