package swtpm

import (
	"bytes"
	"testing"
)

// WithIVOf has what is written while do runs encrypted under the IV of b.
func WithIVOf(t *testing.T, b *Blob, do func()) {
	t.Helper()
	iv := value(b.Fields, tagIVEncryptedData)
	if iv == nil {
		t.Fatal("no IV")
	}
	old := random
	random = bytes.NewReader(iv)
	defer func() { random = old }()
	do()
}
