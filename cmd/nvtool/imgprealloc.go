package main

import (
	"context"
	"errors"
	"fmt"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// preallocModes are QEMU's names.
var preallocModes = map[string]qcow2.Preallocation{"off": qcow2.PreallocOff, "metadata": qcow2.PreallocMetadata,
	"falloc": qcow2.PreallocFalloc, "full": qcow2.PreallocFull}

func parsePrealloc(s string) (qcow2.Preallocation, error) {
	mode, ok := preallocModes[s]
	if !ok {
		return 0, invalidf("preallocation %s: off, metadata, falloc or full", printable(s))
	}
	return mode, nil
}

// preallocate has [off, off+n) of an image allocated.
func preallocate(ctx context.Context, dev image.Device, off, n int64, mode qcow2.Preallocation) error {
	if mode == qcow2.PreallocOff || n <= 0 {
		return nil
	}
	if im, ok := image.As[*qcow2.Image](dev); ok {
		return im.Preallocate(off, n, mode)
	}
	switch mode {
	case qcow2.PreallocFalloc:
		a, ok := image.As[image.Allocator](dev)
		err := image.ErrUnsupported
		if ok {
			err = a.Allocate(off, n)
		}
		if errors.Is(err, image.ErrUnsupported) {
			return withHint(fmt.Errorf("preallocation=falloc of a %s image here: %w", formatOf(dev), err), "preallocation=full writes zeros")
		}
		return err
	case qcow2.PreallocFull:
		zeros := make([]byte, 1<<20)
		for n > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			k := min(n, int64(len(zeros)))
			if _, err := dev.WriteAt(zeros[:k], off); err != nil {
				return err
			}
			off, n = off+k, n-k
		}
		return nil
	}
	return withHint(fmt.Errorf("preallocation=metadata of a %s image: %w", formatOf(dev), image.ErrUnsupported), "off, falloc or full")
}
