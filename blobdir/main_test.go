package blobdir_test

import (
	"os"
	"runtime/debug"
	"testing"
)

// Hundreds of thousands of small stores are opened and forgotten here: let the
// garbage grow.
func TestMain(m *testing.M) {
	debug.SetGCPercent(800)
	os.Exit(m.Run())
}
