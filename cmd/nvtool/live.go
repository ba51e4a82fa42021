package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/nvstore"
)

const liveAbout = `A live extent is a blob in one plain piece of the image, which an emulator opens
directly: pflash, an EEPROM or a SPI flash as a raw window. nvtool put --live
makes one.

Before the machine starts it is attached: from then on its content is the
machine's, and nvtool neither reads nor changes it. When the machine is off,
detach records its checksum, and it is a blob as any other. After a crash of the
machine, and after a revert to a snapshot of a running one, it is attached, and
detach is all that is needed.`

func (a *app) liveCmd() *cobra.Command {
	c := group("live", "Lend blobs to an emulator, which opens them directly",
		a.liveLsCmd(), a.liveAttachCmd(), a.liveDetachCmd(), a.liveArgsCmd())
	c.Long = liveAbout
	return c
}

func (a *app) liveLsCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	c := a.verb("ls IMAGE", "List live extents, where they lie, and whether they are attached", func(ctx context.Context, args []string) (err error) {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		s, err := a.open(ctx, &ref, &key, browsing)
		if err != nil {
			return err
		}
		defer closing(s, &err)
		list, err := s.List("")
		if err != nil {
			return a.explain(&ref, err)
		}
		return a.listLive(slices.DeleteFunc(list, func(e nvstore.Entry) bool { return !e.Live }))
	})
	ref.flags(c)
	ref.previousFlag(c)
	key.flags(c, "the ")
	return c
}

func (a *app) listLive(list []nvstore.Entry) error {
	if a.json {
		facts := make([]*blobFacts, len(list))
		for i := range list {
			facts[i] = entryFacts(&list[i])
		}
		return a.printJSON(facts)
	}
	rows := make([][]string, len(list))
	for i := range list {
		e := &list[i]
		rows[i] = []string{shownName(e), fmt.Sprint(e.Size), fmt.Sprintf("%#x", e.Offset), liveState(e), printable(e.Type)}
	}
	return a.printTable([]string{"name", "size", "offset", "state", "type"}, rows)
}

func (a *app) liveAttachCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	c := a.verb("attach IMAGE [NAME...]", "Mark live extents as the machine's, before it starts", func(ctx context.Context, args []string) error {
		return a.markLive(ctx, &ref, &key, args, "attached", (*nvstore.Store).Attach)
	})
	c.Long = `Mark live extents, or all that the store has, as the machine's, before it
starts. Their content is verified first. Those that are attached already stay so.`
	ref.flags(c)
	key.flags(c, "the ")
	return c
}

func (a *app) liveDetachCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var accept bool
	c := a.verb("detach IMAGE [NAME...] [--accept]", "Take live extents back, and record their checksums, when the machine is off", func(ctx context.Context, args []string) error {
		mark := (*nvstore.Store).Detach
		if accept {
			mark = func(s *nvstore.Store, names ...string) error { return s.Dir().Accept(names...) }
		}
		return a.markLive(ctx, &ref, &key, args, "detached", mark)
	})
	c.Long = `Take live extents, or all that are attached, back from the machine, and record
the checksums of what it wrote. The machine must be off: what writes afterwards
does damage. --accept takes the bytes of those that are not attached for good,
too, as when a machine ran on them without nvtool live attach.`
	ref.flags(c)
	key.flags(c, "the ")
	c.Flags().BoolVar(&accept, "accept", false, "record the checksums of damaged ones, too, as they are")
	return c
}

func (a *app) markLive(ctx context.Context, ref *imageRef, key *keyFlags, args []string, done string, mark func(*nvstore.Store, ...string) error) (err error) {
	args, err = ref.take(args, 0, -1, "")
	if err != nil {
		return err
	}
	names, err := canonical(args)
	if err != nil {
		return err
	}
	s, err := a.open(ctx, ref, key, writing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	if err := mark(s, names...); err != nil {
		if errors.Is(err, blobdir.ErrCorrupt) {
			err = withHint(err, "if a machine ran on it without nvtool live attach, nvtool live detach --accept takes its bytes as they are")
		}
		return a.explain(ref, err)
	}
	list, err := s.List("")
	if err != nil {
		return a.explain(ref, err)
	}
	list = slices.DeleteFunc(list, func(e nvstore.Entry) bool {
		return !e.Live || len(names) > 0 && !slices.Contains(names, e.Name)
	})
	if a.json {
		return a.listLive(list)
	}
	for i := range list {
		a.sayf("%s: %s, generation %d", shownName(&list[i]), done, list[i].Generation)
	}
	if len(list) == 0 {
		a.warnf("%s has no live extents; nvtool put --live makes one", printable(ref.location))
	}
	return nil
}

// detachThese takes those of the blobs back that are attached.
func detachThese(s *nvstore.Store, names []string) error {
	for _, name := range names {
		e, err := s.Stat(name)
		if err != nil {
			return err
		}
		if e.Attached {
			if err := s.Detach(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// liveAllowed keeps what is to be sealed from lying in clear unawares.
func (o *putOptions) liveAllowed(s *nvstore.Store) error {
	switch info, err := s.Info(); {
	case err != nil:
		return err
	case !o.live && o.plain:
		return usagef("--plain goes with --live")
	case o.live && info.Sealed && !o.plain:
		return withHint(invalidf("the store is sealed, and a live extent lies in it in clear"),
			"--plain says that this is meant; nvtool serve nbd gives an emulator a blob that stays sealed")
	}
	return nil
}

// putLive fills a live extent, which it makes if need be.
func (p *putter) putLive(tx *nvstore.Tx, in *bufio.Reader, e *nvstore.Entry) error {
	size := int64(p.o.size)
	if size == 0 {
		if size = e.Size; !e.Live {
			size = p.total
		}
	}
	p.size = size
	if size < 0 {
		return withHint(invalidf("the size of a live extent must be known"), "give --size, or a FILE")
	}
	if p.total >= 0 {
		if err := p.fits(p.total, size); err != nil {
			return err
		}
	}
	if err := p.makeLive(tx, e, size); err != nil {
		return err
	}
	buf := make([]byte, putPiece)
	for off := int64(0); ; {
		n, err := io.ReadFull(in, buf)
		if n > 0 {
			if off+int64(n) > size {
				return p.fits(off+int64(n), size)
			}
			if _, err := tx.WriteAt(p.name, buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
			p.bar.set(off, size)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return p.fillLive(tx, off, size)
		}
		if err != nil {
			return err
		}
	}
}

// wantsRoom returns how many bytes in one piece were not to be had, if the input
// can be read once more.
func (p *putter) wantsRoom(err error) int64 {
	if p.size <= 0 || !errors.Is(err, blobdir.ErrNoSpace) {
		return 0
	}
	if _, err := p.in.Seek(0, io.SeekStart); err != nil {
		return 0
	}
	return p.size
}

// fits compares what there is with the extent's size.
func (p *putter) fits(n, size int64) error {
	if n > size || n < size && p.o.size == 0 {
		return withHint(invalidf("%s is a live extent of %d bytes, and there are %d", printable(p.name), size, n), "--size gives it another size")
	}
	return nil
}

// makeLive makes the extent of this size, or the blob there is into one.
func (p *putter) makeLive(tx *nvstore.Tx, e *nvstore.Entry, size int64) error {
	m, err := p.o.merge(e.Meta)
	if err != nil {
		return err
	}
	switch {
	case e.Name == "":
		return tx.CreateLive(p.name, size, &m)
	case !e.Live:
		// The old content would be copied for nothing.
		err = errors.Join(tx.Truncate(p.name, 0), tx.Truncate(p.name, size), tx.SetLive(p.name, true))
	case e.Attached:
		return fmt.Errorf("blob %q %w", p.name, blobdir.ErrAttached)
	case size != e.Size:
		err = tx.Truncate(p.name, size)
	}
	if err != nil {
		return err
	}
	return tx.SetMeta(p.name, &m)
}

// fillLive puts zeros where the content ended before the extent does.
func (p *putter) fillLive(tx *nvstore.Tx, off, size int64) error {
	if err := p.fits(off, size); err != nil {
		return err
	}
	zeros := make([]byte, min(size-off, putPiece))
	for off < size {
		n := min(int64(len(zeros)), size-off)
		if _, err := tx.WriteAt(p.name, zeros[:n], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}
