// Package chiptest has what the tests of all chips need: memory that can fail,
// wait and go back in time, and recorded bus traffic.
package chiptest

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"nvstore.dev/eeprom"
)

// ErrMemory is what failing memory says.
var ErrMemory = errors.New("memory fails")

// Memory is a chip's memory without a store.
type Memory struct {
	Data    []byte
	NV      byte          // of the status register
	Commits int           // that were carried out
	Fail    bool          // commits fail
	FailRd  bool          // reads fail
	Gate    chan struct{} // if not nil, a commit waits for it
	epoch   int64
}

// New returns erased memory.
func New(size int64) *Memory { return &Memory{Data: bytes.Repeat([]byte{0xff}, int(size))} }

// Size is the length in bytes.
func (m *Memory) Size() int64 { return int64(len(m.Data)) }

// Epoch tells how often Revert was called.
func (m *Memory) Epoch() int64 { return m.epoch }

// Revert replaces the content, as loading a snapshot does.
func (m *Memory) Revert(data []byte) {
	m.Data = bytes.Clone(data)
	m.epoch++
}

// ReadAt reads as io.ReaderAt does.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if m.FailRd {
		return 0, ErrMemory
	}
	if off < 0 || off > m.Size() {
		return 0, fmt.Errorf("offset %d", off)
	}
	if n := copy(p, m.Data[off:]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}

func (m *Memory) commit(epoch int64) error {
	if m.Gate != nil {
		<-m.Gate
	}
	switch {
	case epoch != m.epoch:
		return eeprom.ErrReverted
	case m.Fail:
		return ErrMemory
	}
	m.Commits++
	return nil
}

// Commit writes, unless it is to fail.
func (m *Memory) Commit(p []byte, off, epoch int64) error {
	if err := m.commit(epoch); err != nil {
		return err
	}
	if off < 0 || off > m.Size()-int64(len(p)) {
		return fmt.Errorf("%d bytes at %d", len(p), off)
	}
	copy(m.Data[off:], p)
	return nil
}

// Status returns the non-volatile status.
func (m *Memory) Status() (byte, error) { return m.NV, nil }

// SetStatus changes it, unless it is to fail.
func (m *Memory) SetStatus(v byte, epoch int64) error {
	if err := m.commit(epoch); err != nil {
		return err
	}
	m.NV = v
	return nil
}
