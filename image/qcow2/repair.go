package qcow2

import (
	"context"
	"fmt"

	"nvstore.dev/image"
)

// A leak is clusters with a refcount above the number of their references.
type leak struct {
	span
	refs uint64
}

// maxLeaks bounds the list of them; what is beyond is for another pass.
const maxLeaks = 1 << 16

func appendLeak(list []leak, l leak) []leak {
	if k := len(list); k > 0 {
		if last := &list[k-1]; last.first+last.n == l.first && last.refs == l.refs {
			last.n += l.n
			return list
		}
	}
	if len(list) >= maxLeaks {
		return list
	}
	return append(list, l)
}

// RepairLeaks gives back what a crash left allocated, and sets the copied
// flags as the refcounts then are. It returns what Check found before. An image
// with any other error is left as it is, and fails with image.ErrCorrupt: only
// who knows what the data should be can repair it. A crash during the repair
// leaves the image as it was or repaired.
func (im *Image) RepairLeaks(ctx context.Context) (*CheckResult, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.usable(true); err != nil {
		return nil, err
	}
	var found *CheckResult
	left := int64(-1)
	for {
		if err := im.flushAll(); err != nil {
			return nil, err
		}
		c, err := im.runCheck(ctx, nil)
		if err != nil {
			return nil, err
		}
		if found == nil {
			found = c.res
		}
		switch n := c.res.Errors + c.res.Leaks; {
		case c.res.Errors > c.copied, n == left:
			return nil, fmt.Errorf("qcow2: repairing leaks of an image with %d errors: %w", c.res.Errors, image.ErrCorrupt)
		case n == 0:
			return found, nil
		default:
			left = n
		}
		if err := im.restructure(func() error { return im.lowerRefcounts(c.leaks) }); err != nil {
			return nil, err
		}
	}
}

func (im *Image) lowerRefcounts(leaks []leak) error {
	for _, l := range leaks {
		for c := l.first; c < l.first+l.n; c++ {
			if err := im.setRefcount(c, l.refs); err != nil {
				return err
			}
			if s := im.shadow; l.refs == 0 && len(s.freed) < maxFreed {
				s.freed = appendSpan(s.freed, c)
			}
		}
	}
	return im.ownTables()
}
