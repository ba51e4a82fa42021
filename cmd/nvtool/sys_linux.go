package main

import (
	"os"
	"syscall"
)

// allocatedBytes is what a file takes on its file system.
func allocatedBytes(info os.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}
