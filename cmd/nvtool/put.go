package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/nvstore"
)

// putPiece is how much of a blob is in nvtool's memory at a time.
const putPiece = 1 << 20

type putOptions struct {
	ref       imageRef
	key       keyFlags
	typ       string
	writer    string
	attrs     []string
	chunkSize size
	live      bool
	plain     bool
	size      size // of a live extent
	changed   func(flag string) bool
}

func (a *app) putCmd() *cobra.Command {
	var o putOptions
	c := a.verb("put IMAGE NAME [FILE|-] [--type T] [--writer W] [--attr K=V]...", "Store a blob, or replace its content",
		func(ctx context.Context, args []string) error { return a.put(ctx, &o, args) })
	c.Long = `Store FILE, or standard input, as a blob, all of it or nothing. When nvtool
ends well, the blob is durable. A blob that is there already keeps the type,
writer and attributes that aren't given anew. Chunks that didn't change aren't
written.

With --live the blob is a live extent: one plain piece of the image that an
emulator opens directly (nvtool live args). It has a size of its own: that of
FILE, or --size. It isn't encrypted, so a sealed store wants --plain, too.`
	c.Example = `  nvtool put vm.qcow2 tpm/permanent tpm2-00.permall --type tpm2-permanent --writer "swtpm 0.7.1"
  nvtool put vm.qcow2 net0/nvm - --attr mac=52:54:00:12:34:56 < nvm.bin
  nvtool put vm.qcow2 uefi/vars OVMF_VARS_4M.fd --live`
	o.ref.flags(c)
	o.key.flags(c, "the ")
	f := c.Flags()
	f.StringVar(&o.typ, "type", "", "what the content is, at most 64 bytes")
	f.StringVar(&o.writer, "writer", "", "program and version that produced the bytes, at most 128 bytes")
	f.StringArrayVar(&o.attrs, "attr", nil, "an attribute, `KEY=VALUE`; may be repeated; an empty value removes it")
	f.Var(&o.chunkSize, "chunk-size", "bytes that are rewritten together, a power of two from 4k to 1M (default by size)")
	f.BoolVar(&o.live, "live", false, "make it a live extent, which an emulator can open directly")
	f.BoolVar(&o.plain, "plain", false, "with --live in a sealed store: the content may lie there in clear")
	f.Var(&o.size, "size", "of a live extent, in bytes; what FILE doesn't fill is zeros (default that of FILE, or as it is)")
	o.changed = f.Changed
	return c
}

func (a *app) put(ctx context.Context, o *putOptions, args []string) (err error) {
	args, err = o.ref.take(args, 1, 2, "NAME and at most one FILE")
	if err != nil {
		return err
	}
	names, err := canonical(args[:1])
	if err != nil {
		return err
	}
	name := names[0]
	if _, err := o.merge(nvstore.Meta{}); err != nil {
		return err
	}
	in := os.Stdin
	if len(args) == 2 && args[1] != "-" {
		// Before the key is read: see makeCredential.
		if in, err = os.Open(args[1]); err != nil {
			return err
		}
		defer in.Close()
	}
	total := int64(-1)
	if info, err := in.Stat(); err == nil && info.Mode().IsRegular() {
		total = info.Size()
	} else if err == nil && info.IsDir() {
		return invalidf("%s is a directory", args[1])
	}
	s, err := a.open(ctx, &o.ref, &o.key, writing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	if err := o.liveAllowed(s); err != nil {
		return a.explain(&o.ref, err)
	}
	bar := a.bar(name, total)
	defer bar.end()
	p := &putter{ctx: ctx, o: o, name: name, in: in, total: total, bar: bar}
	err = s.Update(p.run)
	if size := p.wantsRoom(err); size > 0 {
		// What is free may be in pieces.
		if err = s.Dir().MakeRoom(size); err == nil {
			err = s.Update(p.run)
		}
	}
	if err != nil {
		return a.explain(&o.ref, err)
	}
	return a.putDone(s, name)
}

func (a *app) putDone(s *nvstore.Store, name string) error {
	e, err := s.Stat(name)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(entryFacts(&e))
	}
	a.sayf("%s: %d bytes, generation %d", printable(name), e.Size, e.Generation)
	return nil
}

// merge puts the flags over what is said of a blob.
func (o *putOptions) merge(m nvstore.Meta) (nvstore.Meta, error) {
	if o.changed("type") {
		m.Type = o.typ
	}
	if o.changed("writer") {
		m.Writer = o.writer
	}
	if o.chunkSize != 0 {
		m.ChunkSize = int(min(o.chunkSize, 1<<30))
	}
	m.Attributes = slices.Clone(m.Attributes)
	for _, text := range o.attrs {
		k, v, err := splitPair(text)
		if err != nil {
			return m, err
		}
		m.Attributes = slices.DeleteFunc(m.Attributes, func(x blobdir.Attribute) bool { return x.Key == k })
		if v != "" {
			m.Attributes = append(m.Attributes, blobdir.Attribute{Key: k, Value: v})
		}
	}
	return m, nil
}

// A putter streams a file into a blob, in one transaction.
type putter struct {
	ctx   context.Context
	o     *putOptions
	name  string
	in    *os.File
	total int64 // bytes expected; -1 if unknown
	bar   *bar
	size  int64 // of a live extent
}

func (p *putter) run(tx *nvstore.Tx) error {
	in := bufio.NewReaderSize(contextReader{p.ctx, p.in}, putPiece)
	switch e, err := tx.Stat(p.name); {
	case err != nil && !errors.Is(err, blobdir.ErrNotFound):
		return err
	case p.o.live || e.Live:
		return p.putLive(tx, in, &e)
	case p.o.size != 0:
		return invalidf("--size is for live extents; %s is none", printable(p.name))
	}
	if err := p.prepare(tx, in); err != nil {
		return err
	}
	buf := make([]byte, putPiece)
	for off := int64(0); ; {
		n, err := io.ReadFull(in, buf)
		if n > 0 {
			if _, err := tx.WriteAt(p.name, buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
			p.bar.set(off, max(p.total, off))
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return tx.Truncate(p.name, off)
		}
		if err != nil {
			return err
		}
	}
}

// prepare makes the blob, or brings the one there is up to date.
func (p *putter) prepare(tx *nvstore.Tx, in *bufio.Reader) error {
	e, err := tx.Stat(p.name)
	if errors.Is(err, blobdir.ErrNotFound) {
		m, err := p.o.merge(nvstore.Meta{})
		if err != nil {
			return err
		}
		if m.ChunkSize == 0 {
			m.ChunkSize = p.chunkSize(in)
		}
		return tx.Create(p.name, &m)
	}
	if err != nil {
		return err
	}
	m, err := p.o.merge(e.Meta)
	if err != nil {
		return err
	}
	if m.Type != e.Type || m.ChunkSize != e.ChunkSize {
		// The old content would be stored anew for nothing.
		if err := tx.Truncate(p.name, 0); err != nil {
			return err
		}
	}
	return tx.SetMeta(p.name, &m)
}

// chunkSize chooses as the store does where it knows the size: small chunks
// make small changes cheap, and large ones keep the maps of large blobs small.
func (p *putter) chunkSize(in *bufio.Reader) int {
	n := p.total
	if n < 0 {
		head, _ := in.Peek(putPiece)
		if n = int64(len(head)); n == putPiece {
			n = 64 << 20 // a guess: there is more
		}
	}
	return chunkSizeFor(n)
}

func chunkSizeFor(n int64) int {
	switch {
	case n <= 4<<20:
		return 8 << 10
	case n <= 256<<20:
		return 64 << 10
	}
	return 1 << 20
}
