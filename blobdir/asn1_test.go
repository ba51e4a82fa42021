package blobdir_test

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
)

// encoding/asn1 is the independent judge of what is on the medium: it parses
// every structure of real stores, finds what blobdir says, and gives the same
// bytes back.

type asnReference struct {
	Offset, Length int64
	CRC            []byte
	Generation     int64
	MAC            []byte `asn1:"optional,tag:0"`
}

type asnExtension struct {
	ID       asn1.ObjectIdentifier
	Critical bool `asn1:"optional"`
	Value    []byte
}

type asnRoot struct {
	Type             asn1.ObjectIdentifier
	Version          int
	Store            []byte
	Slot             int
	Generation       int64
	Commit, Parent   []byte
	ParentGeneration int64
	Time             time.Time `asn1:"generalized"`
	SealNames        bool
	MaxSize, Blobs   int64
	Directory, Free  asnReference
	KeySlots         asnReference          `asn1:"optional,tag:0"`
	Sealing          asn1.ObjectIdentifier `asn1:"optional"`
	Snapshots        asnReference          `asn1:"optional,tag:1"`
	Extensions       []asnExtension        `asn1:"optional,tag:2"`
}

type asnSettled struct {
	Type       asn1.ObjectIdentifier
	Version    int
	Store      []byte
	Slot       int
	Generation int64
	Digest     []byte
}

type asnHeader struct {
	Type                                     asn1.ObjectIdentifier
	Version                                  int
	Note                                     string `asn1:"utf8"`
	Store                                    []byte
	BlockSize, RootSlot0, RootSlot1, Settled int64
}

type asnSigned[T any] struct {
	Body T
	MAC  []byte `asn1:"optional,tag:0"`
	CRC  []byte
}

type asnNode[T any] struct {
	Type  asn1.ObjectIdentifier
	Level int
	Items []T
}

type asnChild struct {
	Key  asn1.RawValue
	Node asnReference
}

type asnBox struct{ Salt, Commitment, Tag []byte }

type asnChunk struct {
	Index, Offset, Length int64
	CRC                   []byte
	Generation            int64
	Seal                  asnBox `asn1:"optional,tag:0"`
}

type asnAttribute struct {
	Key   string `asn1:"utf8"`
	Value string `asn1:"utf8"`
}

type asnLive struct {
	Offset, Length, Generation int64
	Attached                   bool
	CRC                        []byte `asn1:"optional"`
	MAC                        []byte `asn1:"optional,tag:0"`
}

type asnEntry struct {
	Key               asn1.RawValue
	ID                []byte
	Type              string `asn1:"utf8"`
	Writer            string `asn1:"utf8"`
	Size              int64
	Created, Modified time.Time `asn1:"generalized"`
	Generation        int64
	ChunkSize         int
	Attributes        []asnAttribute
	Chunks            []asnChunk   `asn1:"optional,tag:1"`
	ChunkMap          asnReference `asn1:"optional,tag:2"`
	Live              asnLive      `asn1:"optional,tag:3"`
	Sealed            struct {
		Salt, Commitment, Tag, Ciphertext []byte
	} `asn1:"optional,tag:4"`
	Extensions []asnExtension `asn1:"optional,tag:5"`
}

type asnMetadata struct {
	Name       string `asn1:"utf8"`
	Type       string `asn1:"utf8"`
	Writer     string `asn1:"utf8"`
	Attributes []asnAttribute
}

type asnFreeExtent struct{ Offset, Length, Freed int64 }

type asnFree struct {
	Type    asn1.ObjectIdentifier
	End     int64
	Extents []asnFreeExtent
	Tree    asnReference `asn1:"optional,tag:0"`
}

type asnKeySlots struct {
	Type  asn1.ObjectIdentifier
	Slots []asnKeySlot
}

type asnKeySlot struct {
	ID    int
	Label string `asn1:"utf8"`
	KDF   struct {
		Algorithm  asn1.ObjectIdentifier
		Parameters struct {
			Version                      int
			Salt                         []byte
			MemoryKiB, Time, Parallelism int64
		} `asn1:"optional"`
	}
	Wrap struct {
		Algorithm                      asn1.ObjectIdentifier
		Salt, Commitment, Tag, Wrapped []byte
	}
}

const arcString = "1.2.840.113556.1.8000.2554.64817.25853.8626.17789.42095.794743.15004100."

// asnParse parses what fills p, and demands that encoding it again gives p.
func asnParse[T any](t testing.TB, p []byte) T {
	var v T
	rest, err := asn1.Unmarshal(p, &v)
	require.NoError(t, err)
	require.Empty(t, rest)
	again, err := asn1.Marshal(v)
	require.NoError(t, err)
	require.Equal(t, p, again)
	return v
}

// manyBlobs fills a store so that its trees have levels, and its free space
// is in pieces.
func manyBlobs(t testing.TB, d *blobdir.Dir, n int) {
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	fill := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return p
	}
	for from := 0; from < n; from += 50 {
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			for i := from; i < min(n, from+50); i++ {
				m := &blobdir.Meta{Type: "vpd"[:i%4], Writer: fmt.Sprintf("test %d", i%3), ChunkSize: 4096}
				for k := range i % 3 {
					m.Attributes = append(m.Attributes, blobdir.Attribute{Key: fmt.Sprint("key", k), Value: fmt.Sprint(i)})
				}
				if err := tx.Put(fmt.Sprintf("dev%d/state-%d", i%7, i), fill(i*37%9000), m); err != nil {
					return err
				}
			}
			return nil
		}, nil))
	}
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
		if err := tx.Create("big", &blobdir.Meta{ChunkSize: 4096}); err != nil {
			return err
		}
		if err := tx.Truncate("big", 200*4096); err != nil {
			return err
		}
		for i := range 180 {
			if _, err := tx.WriteAt("big", fill(1+i*20), int64(i)*4096); err != nil {
				return err
			}
		}
		return nil
	}, nil))
	for i := 1; i < n; i += 2 { // one at a time, so that holes have many ages
		if i%4 != 1 {
			continue
		}
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete(fmt.Sprintf("dev%d/state-%d", i%7, i)) }, nil))
	}
}

func TestASN1(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := &flat{make([]byte, 256<<10)}
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		manyBlobs(t, d, 1000)
		require.NoError(t, putLive(d, "uefi/vars", random(9000)))
		require.NoError(t, putLive(d, "spi/0", random(4096)))
		require.NoError(t, d.Attach("spi/0"))
		info, err := d.Info()
		require.NoError(t, err)
		entries := map[[16]byte]blobdir.Entry{}
		content := map[[16]byte][]byte{}
		require.NoError(t, d.View(func(tx *blobdir.Tx) error {
			for e, err := range tx.List("") {
				if err != nil {
					return err
				}
				entries[e.ID] = e
				if e.Attached {
					content[e.ID] = make([]byte, e.Size)
					_, err = tx.Peek(e.Name, content[e.ID], 0)
				} else {
					content[e.ID], err = tx.Get(e.Name, 0)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}))
		require.NoError(t, d.Close())

		f := takeApart(t, dev.p, rawKey)
		c := &asnChecker{t: t, f: f, entries: entries, content: content, seen: map[string]int{}}
		c.fixed(info)
		for _, x := range []*extent{f.slots, f.free, f.dir} {
			if x != nil {
				x.walk(c.extent)
			}
		}
		require.Len(t, entries, c.seen["entry"])
		require.LessOrEqual(t, 2, c.seen["directory level"], "levels of the directory")
		require.LessOrEqual(t, 2, c.seen["chunk map level"], "levels of the chunk map")
		require.NotZero(t, c.seen["free tree"])
		require.Equal(t, 2, c.seen["live"])
		t.Logf("parsed, compared and encoded again: %v", c.seen)
	})
}

type asnChecker struct {
	t       *testing.T
	f       *forgery
	entries map[[16]byte]blobdir.Entry
	content map[[16]byte][]byte
	seen    map[string]int
}

func (c *asnChecker) oid(o asn1.ObjectIdentifier, want string) {
	require.Equal(c.t, arcString+want, o.String())
}

// cut returns the DER element at off.
func (c *asnChecker) cut(off int64) []byte {
	var v asn1.RawValue
	_, err := asn1.Unmarshal(c.f.img[off:], &v)
	require.NoError(c.t, err)
	return v.FullBytes
}

func (c *asnChecker) fixed(info *blobdir.Info) {
	t := c.t
	h := asnParse[asnSigned[asnHeader]](t, c.cut(0))
	c.oid(h.Body.Type, "1.1")
	require.Equal(t, info.UUID[:], h.Body.Store)
	require.Equal(t, []int64{4096, 65536, 131072, 196608}, []int64{h.Body.BlockSize, h.Body.RootSlot0, h.Body.RootSlot1, h.Body.Settled})

	old := asnParse[asnSigned[asnRoot]](t, c.cut(forgeRoots[1-c.f.newest]))
	r := asnParse[asnSigned[asnRoot]](t, c.cut(forgeRoots[c.f.newest]))
	c.oid(r.Body.Type, "1.2")
	require.Equal(t, info.UUID[:], r.Body.Store)
	require.Equal(t, c.f.newest, r.Body.Slot)
	require.Equal(t, info.Generation, r.Body.Generation)
	require.Equal(t, old.Body.Generation, r.Body.ParentGeneration)
	require.Equal(t, info.Blobs, r.Body.Blobs)
	require.Equal(t, info.MaxSize, r.Body.MaxSize)
	require.Equal(t, info.SealNames, r.Body.SealNames)
	require.Equal(t, info.Sealed, len(r.MAC) == 32)
	if info.Sealed {
		c.oid(r.Body.Sealing, "2.3")
	}
	s := asnParse[asnSigned[asnSettled]](t, c.cut(forgeSettled))
	c.oid(s.Body.Type, "1.3")
	require.Equal(t, []int64{r.Body.Generation, int64(c.f.newest)}, []int64{s.Body.Generation, int64(s.Body.Slot)})

	// Nothing but CRCs and MACs is computed by putting together again.
	require.True(t, bytes.Equal(c.f.img, c.f.reseal()))
}

func (c *asnChecker) extent(x *extent) {
	t := c.t
	if x.kind == "chunk" {
		return
	}
	p := c.cut(x.off)
	c.seen[x.kind]++
	switch x.kind {
	case "key slots":
		k := asnParse[asnKeySlots](t, p)
		c.oid(k.Type, "1.5")
		c.oid(k.Slots[0].KDF.Algorithm, "2.2")
		c.oid(k.Slots[0].Wrap.Algorithm, "2.3")
	case "free node":
		c.oid(asnParse[asnFree](t, p).Type, "1.7")
	case "free tree":
		if x.el.at("level").int() == 0 {
			c.oid(asnParse[asnNode[asnFreeExtent]](t, p).Type, "1.8")
		} else {
			c.oid(asnParse[asnNode[asnChild]](t, p).Type, "1.8")
		}
	case "directory":
		if level := int(x.el.at("level").int()); level > 0 {
			c.oid(asnParse[asnNode[asnChild]](t, p).Type, "1.4")
			c.seen["directory level"] = max(c.seen["directory level"], level+1)
			return
		}
		n := asnParse[asnNode[asnEntry]](t, p)
		c.oid(n.Type, "1.4")
		for i := range n.Items {
			c.entry(&n.Items[i], x.el.at("items").kids[i])
		}
	case "chunk map":
		level := int(x.el.at("level").int())
		c.seen["chunk map level"] = max(c.seen["chunk map level"], level+1)
		if level > 0 {
			c.oid(asnParse[asnNode[asnChild]](t, p).Type, "1.6")
			return
		}
		n := asnParse[asnNode[asnChunk]](t, p)
		c.oid(n.Type, "1.6")
	}
}

func (c *asnChecker) entry(a *asnEntry, e *el) {
	t := c.t
	c.seen["entry"]++
	want := c.entries[[16]byte(a.ID)]
	name, typ, writer, attrs := string(a.Key.Bytes), a.Type, a.Writer, a.Attributes
	if e.has("sealed") {
		p, err := c.f.metadata(t, e)
		require.NoError(t, err)
		m := asnParse[asnMetadata](t, p)
		attrs = m.Attributes
		if c.f.names {
			key := macWith(c.f.derive(t, "nvstore v1 name key"), "nvstore v1 name", c.f.uuid, []byte(m.Name))
			require.Equal(t, key, a.Key.Bytes)
			name, typ, writer = m.Name, m.Type, m.Writer
		}
	}
	require.Equal(t, want.Name, name)
	require.Equal(t, want.Type, typ)
	require.Equal(t, want.Writer, writer)
	require.Len(t, attrs, len(want.Attributes))
	for i, x := range attrs {
		require.Equal(t, want.Attributes[i], blobdir.Attribute{Key: x.Key, Value: x.Value})
	}
	require.Equal(t, want.Size, a.Size)
	require.Equal(t, want.Generation, a.Generation)
	require.Equal(t, want.ChunkSize, a.ChunkSize)
	require.True(t, want.Created.Equal(a.Created) && want.Modified.Equal(a.Modified))

	require.Equal(t, want.Live, e.has("live"))
	if e.has("live") {
		c.live(a, e, name)
		return
	}
	p := make([]byte, a.Size)
	chunks := []*el{}
	if e.has("chunks") {
		chunks = e.at("chunks").kids
	} else {
		e.at("chunkMap").to.walk(func(x *extent) {
			if x.kind == "chunk" {
				chunks = append(chunks, x.ref)
			}
		})
	}
	for _, k := range chunks {
		text := k.to.raw
		if c.f.sealed {
			var err error
			text, err = c.f.chunkText(t, e, typ, k)
			require.NoError(t, err)
		}
		copy(p[k.at("index").int()*int64(a.ChunkSize):], text)
		c.seen["chunk"]++
	}
	require.True(t, bytes.Equal(c.content[[16]byte(a.ID)], p), name)
}

func (c *asnChecker) live(a *asnEntry, e *el, name string) {
	t, l := c.t, &a.Live
	c.seen["live"]++
	want := c.entries[[16]byte(a.ID)]
	require.Equal(t, []int64{want.Offset, want.Size}, []int64{l.Offset, l.Length})
	require.Equal(t, want.Attached, l.Attached)
	p := c.f.img[l.Offset:][:l.Length]
	require.True(t, bytes.Equal(c.content[want.ID], p), name)
	if l.Attached {
		require.Less(t, l.Generation, a.Generation)
		require.Empty(t, append(l.CRC, l.MAC...))
		return
	}
	require.Equal(t, crcOf(p), l.CRC)
	if c.f.sealed {
		require.Equal(t, c.f.liveMAC(e, p), l.MAC)
	} else {
		require.Empty(t, l.MAC)
	}
}
