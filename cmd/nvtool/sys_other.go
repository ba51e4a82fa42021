//go:build !linux

package main

import "os"

// allocatedBytes is what a file takes on its file system.
func allocatedBytes(info os.FileInfo) int64 { return info.Size() }
