package blobdir

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
)

// The property of every parser: what it takes, it gives back byte by byte;
// what it refuses, it refuses with an *Error and no result.

// A ram is a Device of at most 2 MiB in memory.
type ram struct{ p []byte }

func (m *ram) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= int64(len(m.p)) {
		return 0, io.EOF
	}
	if n := copy(p, m.p[off:]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}

func (m *ram) WriteAt(p []byte, off int64) (int, error) {
	if err := image.CheckRange(off, int64(len(p)), int64(len(m.p))); err != nil {
		return 0, err
	}
	return copy(m.p[off:], p), nil
}

func (m *ram) Resize(size int64) error {
	if size > 2<<20 || size < int64(len(m.p)) {
		return image.ErrNoSpace
	}
	m.p = append(m.p, make([]byte, size-int64(len(m.p)))...)
	return nil
}

func (m *ram) Size() int64 { return int64(len(m.p)) }
func (*ram) Sync() error   { return nil }
func (*ram) Close() error  { return nil }

func fuzzKey(t testing.TB) *keyslot.Credential {
	c, err := keyslot.RawKey(bytes.Repeat([]byte{0x5a}, 32))
	require.NoError(t, err)
	return c
}

// fuzzStore makes a store whose trees have leaves and inner nodes.
func fuzzStore(t testing.TB, kind byte, blobs int) *Dir {
	o := &CreateOptions{UUID: [16]byte{1, 2, 3}}
	if kind > 0 {
		o.Key = fuzzKey(t)
		o.SealNames = kind > 1
	}
	d, err := Create(&ram{make([]byte, minStoreSize)}, o)
	require.NoError(t, err)
	require.NoError(t, d.Update(func(tx *Tx) error {
		for i := range blobs {
			m := &Meta{Type: "type", Writer: "fuzz", ChunkSize: 4096, Attributes: []Attribute{{"a", "1"}, {"b", "2"}}}
			if err := tx.Put("dir/"+string(rune('a'+i%26))+string(rune('a'+i/26)), bytes.Repeat([]byte{byte(i)}, i*700%6000), m); err != nil {
				return err
			}
		}
		if err := errors.Join(tx.CreateLive("live/off", 5000, nil), tx.CreateLive("live/on", 8192, nil)); err != nil {
			return err
		}
		return tx.Put("mapped", bytes.Repeat([]byte("fuzz"), 6000), &Meta{ChunkSize: 4096})
	}, nil))
	require.NoError(t, d.Attach("live/on"))
	for range 3 {
		require.NoError(t, d.Update(func(tx *Tx) error { return tx.Put("mapped", bytes.Repeat([]byte{byte(tx.gen)}, 23000), nil) }, nil))
	}
	require.NoError(t, d.Settle())
	return d
}

// pieces returns the DER of every structure of one kind of region.
func pieces(t testing.TB, d *Dir, kind RegionKind) (ps [][]byte) {
	require.NoError(t, d.Regions(func(r Region) error {
		if r.Kind == kind {
			p := make([]byte, r.Length)
			require.NoError(t, image.ReadFull(d.dev, p, r.Offset))
			n, ok := newDecoder(p, 0, "").first()
			require.True(t, ok)
			ps = append(ps, p[:n])
		}
		return nil
	}))
	require.NotEmpty(t, ps)
	return ps
}

func flags(kind byte) *profile {
	return &profile{sealed: kind%3 > 0, sealNames: kind%3 > 1, gen: 100, store: [16]byte{1, 2, 3}}
}

// resign puts a right checksum behind a body and, if any, a MAC.
func resign(body, mac []byte) []byte {
	var sum macFunc
	if len(mac) == 32 {
		sum = func(string, ...[]byte) []byte { return mac }
	}
	return appendSigned(body, sum, "")
}

func requireError(t *testing.T, err error) {
	e, ok := err.(*Error)
	require.True(t, ok, "%v", err)
	require.True(t, damaged(err) || unsupported(err), "%v", err)
	require.NotEmpty(t, e.Rule, "%v", err)
}

func FuzzRoot(f *testing.F) {
	for kind := range byte(3) {
		d := fuzzStore(f, kind, 3)
		for slot, s := range d.st.Load().slots {
			body, mac := macOf(s.root.der)
			f.Add(body, mac, byte(slot))
		}
	}
	f.Fuzz(func(t *testing.T, body, mac []byte, slot byte) {
		der := resign(body, mac)
		p := append(slices.Clone(der), 0, 0, 0)
		r, err := parseRoot(p, int(slot%2))
		if err != nil {
			require.Nil(t, r)
			requireError(t, err)
			return
		}
		require.Equal(t, p[:len(r.der)], r.der)
		_, m := macOf(r.der)
		require.Equal(t, p[:len(r.der)], resign(r.appendBody(nil), m))
		require.Equal(t, m != nil, r.sealed())
	})
}

func FuzzSettled(f *testing.F) {
	for kind := range byte(3) {
		body, mac := macOf(pieces(f, fuzzStore(f, kind, 1), RegionSettled)[0])
		f.Add(body, mac)
	}
	f.Fuzz(func(t *testing.T, body, mac []byte) {
		der := resign(body, mac)
		s, err := parseSettled(der, nil)
		if err != nil {
			require.Nil(t, s)
			requireError(t, err)
			return
		}
		_, m := macOf(der)
		require.Equal(t, der, resign(s.appendBody(nil), m))
	})
}

func FuzzHeader(f *testing.F) {
	body, _ := macOf(encodeHeader([16]byte{1, 2, 3}))
	f.Add(body)
	f.Fuzz(func(t *testing.T, body []byte) {
		der := resign(body, nil)
		store, err := parseHeader(der)
		if err != nil {
			require.Zero(t, store)
			requireError(t, err)
			return
		}
		require.Equal(t, der, encodeHeader(store))
	})
}

var fuzzTrees = []*treeKind{directoryTree, chunkTree, freeTree}

func FuzzNode(f *testing.F) {
	for kind := range byte(3) {
		d := fuzzStore(f, kind, 60)
		for i, r := range []RegionKind{RegionDirectory, RegionChunkMap} {
			for _, p := range pieces(f, d, r) {
				f.Add(p, byte(i), kind, int8(-1))
			}
		}
		free := &node{items: [][]byte{freeExtent{4096, 8192, 3}.append(nil)}, keys: [][]byte{intKey(4096)}}
		f.Add(free.encode(nil, freeTree, flags(kind)), byte(2), kind, int8(0))
	}
	f.Fuzz(func(t *testing.T, p []byte, tree, kind byte, level int8) {
		k, pr := fuzzTrees[tree%3], flags(kind)
		ref := reference{off: 4096, length: int64(len(p)), gen: 100}
		n, err := parseNode(p, ref, k, pr, max(int(level), -1))
		if err != nil {
			require.Nil(t, n)
			requireError(t, err)
			return
		}
		require.Equal(t, p, n.encode(nil, k, pr))
		require.True(t, level < 0 || n.level == int(level))
		require.True(t, slices.IsSortedFunc(n.keys, bytes.Compare))
		require.Equal(t, len(n.keys), len(n.items)+len(n.kids))
	})
}

func FuzzEntry(f *testing.F) {
	for kind := range byte(3) {
		d := fuzzStore(f, kind, 8)
		for _, p := range pieces(f, d, RegionDirectory) {
			pr := flags(kind)
			if n, err := parseNode(p, reference{gen: 100}, directoryTree, pr, -1); err == nil {
				for _, it := range n.items {
					f.Add(it, kind)
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, p []byte, kind byte) {
		pr := flags(kind)
		e, err := parseEntry(p, 0, pr)
		if err != nil {
			require.Nil(t, e)
			requireError(t, err)
			return
		}
		require.Equal(t, p, e.append(nil, pr))
		if !pr.sealNames {
			require.NoError(t, CheckName(e.Name))
		}
		if l := e.live; l != nil {
			require.True(t, l.length == e.Size && l.off%BlockSize == 0 && !reserved(l.off, l.length))
			require.Equal(t, l.attached, l.crc == nil && l.mac == nil)
		}
		for i := range e.chunks {
			require.LessOrEqual(t, e.chunks[i].index*int64(e.ChunkSize)+e.chunks[i].length, e.Size)
		}
	})
}

func FuzzFreeNode(f *testing.F) {
	for kind := range byte(3) {
		f.Add(pieces(f, fuzzStore(f, kind, 9), RegionFreeNode)[0], kind)
	}
	f.Fuzz(func(t *testing.T, p []byte, kind byte) {
		n, err := parseFreeNode(p, reference{off: 4096, gen: 100}, flags(kind))
		if err != nil {
			require.Nil(t, n)
			requireError(t, err)
			return
		}
		require.Equal(t, p, n.encode(nil))
		last := int64(0)
		for _, e := range n.extents {
			require.LessOrEqual(t, last, e.off)
			last = e.end()
		}
		require.LessOrEqual(t, last, n.end)
	})
}

// A link says where a checksum and a MAC of an extent lie.
type link struct {
	off, length, crc, mac int64 // mac is 0 if there is none
}

// links lists what reaches each extent, children first, so that a fuzzed
// image can be made consistent again.
func links(t testing.TB, d *Dir) (ls []link) {
	img := d.dev.(*ram).p
	find := func(from, n int64, ref *reference) link {
		l := link{off: ref.off, length: ref.length}
		at := bytes.Index(img[from:from+n], appendCRC(nil, ref.crc))
		require.GreaterOrEqual(t, at, 0)
		l.crc = from + int64(at) + 2
		if ref.mac != nil {
			l.mac = from + int64(bytes.Index(img[from:from+n], ref.mac))
		}
		return l
	}
	var tree func(k *treeKind, ref *reference)
	tree = func(k *treeKind, ref *reference) {
		st := d.st.Load()
		n, err := d.load(k, *ref, -1, &st.prof)
		require.NoError(t, err)
		for _, c := range n.kids {
			tree(k, &c.ref)
			ls = append(ls, find(ref.off, ref.length, &c.ref))
		}
		for _, it := range n.items {
			if k != directoryTree {
				continue
			}
			e, err := parseEntry(it, 0, &st.prof)
			require.NoError(t, err)
			for i := range e.chunks {
				ls = append(ls, find(ref.off, ref.length, &e.chunks[i].reference))
			}
			if e.chunkMap != nil {
				tree(chunkTree, e.chunkMap)
				ls = append(ls, find(ref.off, ref.length, e.chunkMap))
			}
		}
	}
	r := d.st.Load().root
	tree(directoryTree, &r.dir)
	at := rootSlots[r.slot]
	ls = append(ls, find(at, maxRoot, &r.dir), find(at, maxRoot, &r.free))
	if r.keySlots != nil {
		ls = append(ls, find(at, maxRoot, r.keySlots))
	}
	return ls
}

// FuzzOpen changes bytes of whole images, makes checksums (and MACs, as an
// enemy with the key could) right again if mode says so, and uses what opens.
func FuzzOpen(f *testing.F) {
	type seed struct {
		img   []byte
		links []link
		keys  *keys
		used  []int64 // offsets of blocks in use
		slot  int
	}
	seeds := make([]seed, 3)
	for kind := range seeds {
		d := fuzzStore(f, byte(kind), 30)
		s := &seeds[kind]
		s.links, s.keys, s.slot = links(f, d), d.keys, d.st.Load().root.slot
		require.NoError(f, d.Regions(func(r Region) error {
			if r.Kind != RegionFree && r.Kind != RegionChunk {
				s.used = append(s.used, r.Offset)
			}
			return nil
		}))
		slices.Sort(s.used)
		s.img = d.dev.(*ram).p
		f.Add([]byte{}, byte(kind))
		for i := range s.used {
			f.Add([]byte{byte(i), 0, 40, 0xff, byte(i), 0, 90, 1}, byte(kind)|4)
			f.Add([]byte{byte(i), 0, 60, 0x80, byte(i), 1, 9, 7}, byte(kind)|12)
		}
	}
	// edits are of four bytes: which used block, offset in it (two), what is
	// added to the byte there.
	f.Fuzz(func(t *testing.T, edits []byte, mode byte) {
		s := &seeds[int(mode&3)%3]
		img := slices.Clone(s.img)
		for ; len(edits) >= 4; edits = edits[4:] {
			at := s.used[int(edits[0])%len(s.used)] + int64(edits[1])%16<<8 + int64(edits[2])
			img[at] += edits[3]
		}
		if mode&4 != 0 {
			repair(img, s.links, s.slot, s.keys, mode&8 != 0)
		}
		if mode&16 != 0 {
			clear(img[settledOffset : settledOffset+maxRoot])
		}
		for _, o := range []*Options{{ReadOnly: true}, {Keyless: true}, {}, {Previous: true}} {
			if mode&3 != 0 && mode&3 != 3 && !o.Keyless {
				o.Key = fuzzKey(t)
			}
			use(t, &ram{slices.Clone(img)}, o)
		}
	})
}

func repair(img []byte, ls []link, slot int, k *keys, macs bool) {
	for _, l := range ls {
		p := img[l.off : l.off+l.length]
		copy(img[l.crc:], appendCRC(nil, checksum(p))[2:])
		if macs && k != nil && l.mac > 0 {
			copy(img[l.mac:], k.sum()(labelNode, p))
		}
	}
	at := rootSlots[slot]
	n, ok := newDecoder(img[at:at+maxRoot], 0, "").first()
	if !ok || n < 10 {
		return
	}
	// The body ends before the checksum and, in a sealed store, the MAC.
	der := img[at : at+int64(n)]
	start := 4
	if der[1] < 0x80 {
		start = 2
	} else if der[1] == 0x81 {
		start = 3
	}
	end := n - 6
	if macs && k != nil && end-34 > start {
		copy(der[end-32:end], k.sum()(labelRoot, der[start:end-34]))
	}
	copy(der[n-4:], appendCRC(nil, checksum(der[start:end]))[2:])
	sum := sha256.Sum256(der)
	s := &settled{slot: slot, digest: sum, gen: 1}
	if r, err := parseRoot(img[at:at+maxRoot], slot); err == nil {
		s.store, s.gen = r.store, r.gen
	}
	clear(img[settledOffset : settledOffset+maxRoot])
	copy(img[settledOffset:], s.encode(k.sum()))
}

// use does with a store what a user would. Errors are fine; what is read twice
// must be the same.
func use(t *testing.T, dev *ram, o *Options) {
	d, err := Open(dev, o)
	if err != nil {
		require.Nil(t, d)
		return
	}
	defer d.Close()
	var names []string
	d.View(func(tx *Tx) error {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			names = append(names, e.Name)
			if p, err := tx.Get(e.Name, 1<<20); err == nil {
				again, err := tx.Get(e.Name, 1<<20)
				require.NoError(t, err)
				require.Equal(t, p, again)
			}
		}
		return nil
	})
	for _, change := range []func(...string) error{d.Attach, d.Detach, d.Accept} {
		_ = change()
	}
	d.Check(context.Background(), nil)
	d.Info()
	d.Regions(func(Region) error { return nil })
	for i, name := range append(names[:min(len(names), 6)], "new") {
		err := d.Update(func(tx *Tx) error {
			switch i % 4 {
			case 0:
				return tx.Delete(name)
			case 1:
				return tx.Truncate(name, 100)
			case 2:
				_, err := tx.WriteAt(name, []byte("fuzz"), 5000)
				return err
			}
			return tx.Put(name, []byte("other"), nil)
		}, nil)
		if err == nil && i%4 == 3 {
			require.NoError(t, d.View(func(tx *Tx) error {
				p, err := tx.Get(name, 0)
				require.Equal(t, "other", string(p))
				return err
			}))
		}
	}
}
