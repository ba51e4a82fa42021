//go:build amd64 && !purego

package xts

import "golang.org/x/sys/cpu"

// The kernels use AES instructions in VEX encoding, 128 bits wide: the legacy
// encoding needs a copy wherever a source must live on.
var accelerated = cpu.X86.HasAES && cpu.X86.HasAVX
