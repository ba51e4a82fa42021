//go:build arm64 && !purego

package xts

import (
	"runtime"

	"golang.org/x/sys/cpu"
)

// Every arm64 machine that macOS or iOS runs on has the AES instructions, and
// x/sys/cpu doesn't look there.
var accelerated = cpu.ARM64.HasAES || runtime.GOOS == "darwin" || runtime.GOOS == "ios"
