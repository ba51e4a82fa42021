//go:build !amd64 && !arm64

package libtpms

import (
	"sync/atomic"

	"github.com/ebitengine/purego"
)

func localityCallback() uintptr {
	return purego.NewCallback(func(to *uint32, _ uint32) uintptr {
		*to = atomic.LoadUint32(&locality)
		return 0
	})
}
