package tpmstate

import (
	"bytes"
	"fmt"
	"sync"
)

// Memory is a home that lasts as long as the process, for a TPM that is to be
// looked at, or made. The zero value is empty.
type Memory struct {
	mu sync.Mutex
	s  State
}

var _ Home = (*Memory)(nil)

// Load returns a blob.
func (m *Memory) Load(k Kind) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.s[k] == nil {
		return nil, fmt.Errorf("%s: %w", k, ErrNotFound)
	}
	return bytes.Clone(m.s[k]), nil
}

// Store replaces a blob.
func (m *Memory) Store(k Kind, blob []byte) error {
	if err := CheckSize(k, len(blob)); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.s[k] = bytes.Clone(blob)
	return nil
}

// Delete removes a blob.
func (m *Memory) Delete(k Kind) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.s[k] = nil
	return nil
}

// Replace makes s the whole state.
func (m *Memory) Replace(s State) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, blob := range s {
		m.s[k] = bytes.Clone(blob)
	}
	return nil
}

// Close forgets the state.
func (m *Memory) Close() error { return m.Replace(State{}) }
