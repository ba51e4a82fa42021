package blobdir

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
)

// An image whose blobs all name one large chunk map, with checksums right,
// must not make opening or checking a walk without end.
func TestSharedExtentsAreFollowedOnce(t *testing.T) {
	dev := imagetest.NewCrash(16<<20, nil)
	d, err := Create(dev, nil)
	require.NoError(t, err)
	require.NoError(t, d.Update(func(tx *Tx) error { return tx.Put("a", make([]byte, 4<<20), &Meta{ChunkSize: 4096}) }, nil))
	// Entries of the writer's own making: each has the first blob's map.
	require.NoError(t, d.Update(func(tx *Tx) error {
		b, err := tx.blob("a")
		if err != nil {
			return err
		}
		for i := range 3000 {
			e := b.entry
			e.Name = fmt.Sprintf("copy-%d", i)
			e.key, e.Generation = []byte(e.Name), tx.gen
			e.ID[0], e.ID[1] = byte(i), byte(i>>8)
			if err := tx.dir.put(e.key, e.append(nil, tx.prof)); err != nil {
				return err
			}
		}
		limit := int64(0)
		tx.maxSize = &limit
		return nil
	}, nil))
	before := dev.Trace()
	d, err = Open(dev.Reopen(), nil)
	require.NoError(t, err)
	rep, err := d.Check(context.Background(), nil)
	require.NoError(t, err)
	require.Len(t, rep.Errors, maxCheckItems, "one for each second user, up to a limit")
	require.Less(t, d.dev.(*imagetest.CrashDevice).Trace().Sub(before).BytesRead, int64(64<<20))
}
