package blobdir_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
)

// An enemy without the key has every image that the store ever was, and other
// stores of the same user; he moves authentic parts to where they don't
// belong.

// swapStore has blobs of equal shape, so that exchanging them breaks no rule
// but authenticity. hist has the image after each commit.
func swapStore(t testing.TB, kind string, uuid byte) (hist [][]byte) {
	dev := &flat{make([]byte, 256<<10)}
	o := createOptions(t, kind)
	o.UUID[0], o.UUID[15] = 0x42, uuid
	d, err := blobdir.Create(dev, o)
	require.NoError(t, err)
	text := func(seed, n int) []byte { return bytes.Repeat([]byte{byte(seed)}, n) }
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
		m := &blobdir.Meta{Type: "t", ChunkSize: 4096, Attributes: []blobdir.Attribute{{Key: "k", Value: "v"}}}
		return errors.Join(tx.Put("alpha", text(1, 8192), m), tx.Put("gamma", text(2, 8192), m), tx.Put("large", text(3, 6*4096), m))
	}, nil))
	for i := range 6 {
		hist = append(hist, slices.Clone(dev.p))
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			return errors.Join(tx.Put("alpha", text(10+i, 8192), nil), tx.Put("gamma", text(20+i, 8192), nil), tx.Put("large", text(30+i, 6*4096), nil))
		}, nil))
		if i%2 == 1 {
			require.NoError(t, d.Settle())
		}
	}
	require.NoError(t, d.Close())
	return append(hist, dev.p)
}

// refusedSwap demands that the image gives an error of one of the kinds when
// it is opened and read, and in no case bytes that aren't want's.
func refusedSwap(t testing.TB, img []byte, kind string, kinds ...error) {
	for _, readOnly := range []bool{true, false} {
		fs := examine(slices.Clone(img), options(t, kind, readOnly))
		ok := slices.ContainsFunc(fs, func(f finding) bool {
			return f.kind != nil && slices.ContainsFunc(kinds, func(k error) bool { return errors.Is(f.kind, k) })
		})
		require.True(t, ok, "%v", fs)
	}
}

func chunksOf(e *el) []*el {
	if e.has("chunks") {
		return e.at("chunks").kids
	}
	var cs []*el
	e.at("chunkMap").to.walk(func(x *extent) {
		if x.kind == "chunk" {
			cs = append(cs, x.ref)
		}
	})
	return cs
}

// TestSwapContent exchanges stored bytes: of chunks and nodes, within a blob,
// between blobs, stores and times. First the bytes alone, as a dd would; then
// with the checksums in the references made right, up to the root's.
func TestSwapContent(t *testing.T) {
	for _, kind := range kinds[1:] {
		t.Run(kind, func(t *testing.T) {
			hist := swapStore(t, kind, 1)
			other := swapStore(t, kind, 2) // the same key file, another store
			img := hist[len(hist)-1]
			a := takeApart(t, img, rawKey)
			pairs := 0
			swap := func(x *extent, bytes []byte) {
				pairs++
				bad := slices.Clone(img)
				copy(bad[x.off:], bytes)
				if x.kind == "free node" { // a hint: it is made anew, and Check says so
					require.True(t, has(examine(bad, options(t, kind, true)), "check", "R23", nil))
				} else {
					refusedSwap(t, bad, kind, corrupt, tampered)
				}

				f := takeApart(t, img, rawKey)
				for _, top := range []*extent{f.slots, f.free, f.dir} {
					top.walk(func(y *extent) {
						if y.off == x.off {
							y.el, y.raw = nil, bytes
						}
					})
				}
				if x.kind == "key slots" {
					refusedSwap(t, f.resealWith(nil), kind, blobdir.ErrKey, corrupt, tampered)
					return
				}
				refusedSwap(t, f.resealWith(nil), kind, tampered)
			}
			all := func(f *forgery) (xs []*extent) {
				for _, top := range []*extent{f.slots, f.free, f.dir} {
					top.walk(func(x *extent) { xs = append(xs, x) })
				}
				return xs
			}
			mine := all(a)
			for i, x := range mine {
				for _, y := range mine[:i] {
					if x.kind == y.kind && len(x.bytes()) == len(y.bytes()) {
						swap(x, y.bytes())
					}
				}
			}
			for _, from := range [][]byte{other[len(other)-1], hist[len(hist)-2], hist[2]} {
				for _, y := range all(takeApart(t, from, rawKey)) {
					for _, x := range mine {
						if x.kind == y.kind && !bytes.Equal(x.bytes(), y.bytes()) {
							swap(x, y.bytes())
						}
					}
				}
			}
			t.Logf("%d exchanges refused", pairs)
		})
	}
}

// TestSwapReferences exchanges references and entries' fields, so that each
// extent still has its right checksum; the enemy makes the nodes' right too.
func TestSwapReferences(t *testing.T) {
	for _, kind := range kinds[1:] {
		hist := swapStore(t, kind, 1)
		img, older := hist[len(hist)-1], hist[len(hist)-3]
		both := func(f *forgery) (a, b *el) {
			for _, e := range f.entries() {
				if e.has("chunks") {
					a, b = b, e
				}
			}
			return a, b
		}
		for _, c := range []struct {
			name string
			do   func(f, old *forgery)
		}{
			{"chunks of two blobs", func(f, _ *forgery) {
				a, b := both(f)
				i := a.index("chunks")
				a.kids[i], b.kids[i] = b.kids[i], a.kids[i]
			}},
			{"ids of two blobs", func(f, _ *forgery) { a, b := both(f); a.kids[1], b.kids[1] = b.kids[1], a.kids[1] }},
			{"names of two blobs", func(f, _ *forgery) { a, b := both(f); a.kids[0].val, b.kids[0].val = b.kids[0].val, a.kids[0].val }},
			{"a new name", func(f, _ *forgery) { f.entries()[0].kids[0].val[0]-- }},
			{"metadata of two blobs", func(f, _ *forgery) {
				a, b := both(f)
				i := a.index("sealed")
				a.kids[i], b.kids[i] = b.kids[i], a.kids[i]
			}},
			{"order of chunks", func(f, _ *forgery) {
				a, _ := both(f)
				c := a.at("chunks").kids
				c[0].kids[0], c[1].kids[0] = c[1].kids[0], c[0].kids[0]
				a.at("chunks").swap(0, 1)
			}},
			{"order of chunks in a map", func(f, _ *forgery) {
				c := f.mapped().at("chunkMap").to.el.at("items")
				c.kids[2].kids[0], c.kids[4].kids[0] = c.kids[4].kids[0], c.kids[2].kids[0]
				c.swap(2, 4)
			}},
			{"an older entry", func(f, old *forgery) { *f.entries()[0] = *old.entries()[0] }},
			{"an older chunk map", func(f, old *forgery) { f.mapped().at("chunkMap").to.el = old.mapped().at("chunkMap").to.el }},
			{"an older free node", func(f, old *forgery) { f.free.el = old.free.el }},
			{"an older directory", func(f, old *forgery) { f.dir.el, f.dir.kids = old.dir.el, nil }},
			{"a blob less", func(f, _ *forgery) {
				f.dir.el.at("items").remove(0)
				f.body().at("blobs").setInt(2)
			}},
			{"a shorter blob", func(f, _ *forgery) {
				a, _ := both(f)
				a.at("chunks").remove(1)
				a.at("size").setInt(4096)
			}},
		} {
			t.Run(kind+"/"+c.name, func(t *testing.T) {
				f, old := takeApart(t, img, rawKey), takeApart(t, older, rawKey)
				c.do(f, old)
				refusedSwap(t, f.resealWith(nil), kind, tampered)

				// Had he the MAC key but not the chunk key, content would
				// still not open in a wrong place.
				f, old = takeApart(t, img, rawKey), takeApart(t, older, rawKey)
				c.do(f, old)
				switch c.name {
				case "chunks of two blobs", "ids of two blobs", "order of chunks", "order of chunks in a map":
					refusedSwap(t, f.reseal(), kind, tampered)
				}
			})
		}
	}
}

// TestSwapRoots puts each authentic root of the store's history, and of
// another store, into each slot. What opens must be one state of the history,
// whole; a slot's own older roots are no parents and no children.
func TestSwapRoots(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			hist := swapStore(t, kind, 1)
			other := swapStore(t, kind, 2)
			states := []map[string]string{}
			for _, img := range hist {
				states = append(states, contents(t, img, kind))
			}
			counts := map[string]int{}
			img := hist[len(hist)-1]
			newest := takeApart(t, img, rawKey).newest
			for h, from := range append(slices.Clone(hist[:len(hist)-1]), other...) {
				for slot, off := range forgeRoots {
					for source, src := range forgeRoots {
						for _, settled := range []bool{true, false} {
							bad := slices.Clone(img)
							copy(bad[off:off+512], from[src:src+512])
							if !settled {
								clear(bad[forgeSettled : forgeSettled+512])
							}
							d, err := blobdir.Open(&flat{bad}, options(t, kind, true))
							if err != nil {
								require.True(t, errors.Is(err, blobdir.ErrStraddled) || errors.Is(err, corrupt) || errors.Is(err, tampered), "%v", err)
								counts[kindOf(err)]++
								continue
							}
							got := contents(t, bad, kind)
							i := slices.IndexFunc(states, func(s map[string]string) bool { return fmt.Sprint(s) == fmt.Sprint(got) })
							require.GreaterOrEqual(t, i, 0, "root %d of slot %d in slot %d: content that never was: %v", h, source, slot, got)
							// Only the generation that is newest, or its
							// parent where the newest root is overwritten.
							least := len(states) - 1
							if slot == newest {
								least--
							}
							require.GreaterOrEqual(t, i, least)
							counts[fmt.Sprintf("%d commits back", len(states)-1-i)]++
							require.NoError(t, d.Close())
						}
					}
				}
			}
			t.Log(counts)
		})
	}
}

func kindOf(err error) string {
	for _, k := range []error{blobdir.ErrStraddled, corrupt, tampered} {
		if errors.Is(err, k) {
			return k.Error()
		}
	}
	return err.Error()
}

func contents(t testing.TB, img []byte, kind string) map[string]string {
	d, err := blobdir.Open(&flat{slices.Clone(img)}, options(t, kind, true))
	require.NoError(t, err)
	defer d.Close()
	m := map[string]string{}
	require.NoError(t, d.View(func(tx *blobdir.Tx) error {
		for e, err := range tx.List("") {
			require.NoError(t, err)
			p, err := tx.Get(e.Name, 0)
			require.NoError(t, err)
			m[e.Name] = fmt.Sprint(len(p), crcOf(p))
		}
		return nil
	}))
	return m
}

// Replacing a sealed store by a plain one gains nothing: whoever has a key
// isn't given a plain store.
func TestDowngrade(t *testing.T) {
	for _, kind := range kinds[1:] {
		plain := swapStore(t, "plain", 1)
		sealed := swapStore(t, kind, 1)
		_, err := blobdir.Open(&flat{slices.Clone(plain[len(plain)-1])}, openOptions(t, kind))
		require.ErrorIs(t, err, blobdir.ErrPlain)

		// One plain root of the same UUID, as child or as parent.
		img := sealed[len(sealed)-1]
		f := takeApart(t, img, rawKey)
		p := takeApart(t, plain[len(plain)-1], nil)
		for _, up := range []int64{+1, -1} {
			root := p.root().clone()
			if up < 0 {
				root = p.roots[1-p.newest].clone()
			}
			root.at("body.slot").setInt(int64(1 - f.newest))
			root.at("body.generation").setInt(f.body().at("generation").int() + up)
			root.at("body.parentGeneration").setInt(f.body().at("generation").int() + up - 1)
			for _, digest := range []bool{true, false} {
				bad := slices.Clone(img)
				r := root.clone()
				if digest {
					r.at("body.parent").set(sha(img[forgeRoots[f.newest]:][:derSize(img[forgeRoots[f.newest]:])]))
				}
				r.at("crc32c").val = crcOf(r.at("body").encode())
				off := forgeRoots[1-f.newest]
				clear(bad[off : off+512])
				copy(bad[off:], r.encode())
				_, err := blobdir.Open(&flat{bad}, openOptions(t, kind))
				require.True(t, errors.Is(err, blobdir.ErrPlain) || errors.Is(err, tampered), "%v", err)
			}
		}
	}
}

// Key slots of another store of the same user, or of the same store at
// another time, open nothing or are found out.
func TestSwapKeySlots(t *testing.T) {
	second, err := keyslot.Passphrase([]byte("second"))
	require.NoError(t, err)
	dev := &flat{swapStore(t, "sealed", 1)[6]}
	d, err := blobdir.Open(dev, openOptions(t, "sealed"))
	require.NoError(t, err)
	id, err := d.AddKey(second, &keyslot.Options{Label: "label of the second slot", Argon2: kdf.MinArgon2id()})
	require.NoError(t, err)
	require.NoError(t, d.Close())
	img := dev.p

	t.Run("another store's", func(t *testing.T) {
		other := takeApart(t, swapStore(t, "sealed", 2)[6], rawKey)
		f := takeApart(t, img, rawKey)
		f.slots.el = other.slots.el
		_, err := blobdir.Open(&flat{f.resealWith(nil)}, openOptions(t, "sealed"))
		require.ErrorIs(t, err, blobdir.ErrKey)
		_, err = blobdir.Open(&flat{f.reseal()}, openOptions(t, "sealed"))
		require.ErrorIs(t, err, blobdir.ErrKey)
	})
	t.Run("a removed slot's return", func(t *testing.T) {
		dev := &flat{slices.Clone(img)}
		d, err := blobdir.Open(dev, openOptions(t, "sealed"))
		require.NoError(t, err)
		require.NoError(t, d.RemoveKey(id))
		require.NoError(t, d.Close())
		f, old := takeApart(t, dev.p, rawKey), takeApart(t, img, rawKey)
		f.slots.el = old.slots.el
		for _, cred := range []*keyslot.Credential{credential(t), second} {
			_, err = blobdir.Open(&flat{slices.Clone(f.resealWith(nil))}, &blobdir.Options{Key: cred})
			require.ErrorIs(t, err, tampered)
		}
	})
	// The label of slot 1 is changed, and four of its bytes keep the checksum
	// right. Slot 0 opens as ever; its MAC says what happened.
	t.Run("changed under its checksum", func(t *testing.T) {
		f := takeApart(t, img, rawKey)
		bad := slices.Clone(img)
		p := bad[f.slots.off : f.slots.off+int64(len(f.slots.bytes()))]
		at := bytes.Index(p, []byte("label of"))
		require.Positive(t, at)
		var done bool
		for i := 0; i < 256 && !done; i++ { // until the four bytes are text
			copy(p, f.slots.bytes())
			p[at] = byte('A' + i%26)
			p[at+1] = byte('a' + i/26)
			p[at+2] = byte('a' + i%7)
			fix := bytes.Index(p, []byte("second slot"))
			require.True(t, patchCRC(p, fix, f.slots.ref.at("crc32c").val))
			_, err := keyslot.Parse(p)
			done = err == nil
		}
		if !done {
			// Four bytes of the slot's wrapped key do as well.
			copy(p, f.slots.bytes())
			p[at] ^= 1
			require.True(t, patchCRC(p, len(p)-8, f.slots.ref.at("crc32c").val))
			_, err := keyslot.Parse(p)
			require.NoError(t, err)
		}
		for _, readOnly := range []bool{true, false} {
			d, err := blobdir.Open(&flat{slices.Clone(bad)}, options(t, "sealed", readOnly))
			require.ErrorIs(t, err, tampered, "opening must check the MAC of the key slots")
			require.Nil(t, d)
		}
	})
	// Check finds it in any case.
	t.Run("check", func(t *testing.T) {
		f := takeApart(t, img, rawKey)
		bad := slices.Clone(img)
		p := bad[f.slots.off : f.slots.off+int64(len(f.slots.bytes()))]
		p[bytes.Index(p, []byte("label of"))] ^= 1
		require.True(t, patchCRC(p, len(p)-8, f.slots.ref.at("crc32c").val))
		d, err := blobdir.Open(&flat{bad}, options(t, "sealed", true))
		if err != nil {
			require.ErrorIs(t, err, tampered)
			return
		}
		rep, err := d.Check(context.Background(), nil)
		require.NoError(t, err)
		require.Equal(t, "R24", rep.Errors[0].Code)
	})
}
