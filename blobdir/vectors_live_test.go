package blobdir_test

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// live gives the empty entry a live extent.
func (f *forgery) live(off, length, gen int64, attached byte, crc []byte) *el {
	e := f.hollow()
	e.at("size").setInt(4096)
	l := derSeq(0xa3, derInt(off), derInt(length), derInt(gen), derBytes(1, []byte{attached}))
	if crc != nil {
		l.add(derBytes(4, crc))
	}
	if crc != nil && attached == 0 && f.sealed {
		l.add(derBytes(0x80, f.liveMAC(e, make([]byte, 4096))))
	}
	e.kids[e.index("chunks")] = l
	return l
}

// liveMAC is that of section 10.2.
func (f *forgery) liveMAC(entry *el, content []byte) []byte {
	return macWith(f.mac, "nvstore v1 live", f.uuid, append(slices.Clone(entry.at("id").val), sha(content)...))
}

// spare is a block for a live extent, of zeros.
func (f *forgery) spare() int64 { return f.place(&extent{raw: make([]byte, 4096)}).off }

// liveVectors: live extents.
func liveVectors() (vs []vector) {
	crc := crcOf(make([]byte, 4096))
	gen := func(f *forgery) int64 { return f.hollow().at("generation").int() }
	live := func(name, only, where, rule string, fault func(f *forgery)) {
		vs = append(vs, vector{"live, " + name, rule, where, corrupt, only, fault})
	}
	live("misaligned", "", atRead, "R49", func(f *forgery) { f.live(f.spare()+512, 4096, 1, 0, crc) })
	for _, at := range forgeRoots {
		live("reserved block", "", atRead, "R49", func(f *forgery) { f.live(at, 4096, 1, 0, crc) })
	}
	live("over a reserved block", "", atRead, "R49", func(f *forgery) {
		e := f.hollow()
		f.live(15*4096, 8192, 1, 0, crc)
		e.at("size").setInt(8192)
	})
	live("another size", "", atRead, "R49", func(f *forgery) { f.live(f.spare(), 4095, 1, 0, crc) })
	live("attached with a checksum", "", atRead, "R49", func(f *forgery) { f.live(f.spare(), 4096, 1, 0xff, crc) })
	live("detached without a checksum", "", atRead, "R49", func(f *forgery) { f.live(f.spare(), 4096, 1, 0, nil) })
	live("attached by the generation that wrote it", "", atRead, "R49", func(f *forgery) { f.live(f.spare(), 4096, gen(f), 0xff, nil) })
	live("a MAC in a plain store", "plain", atRead, "R49", func(f *forgery) { f.live(f.spare(), 4096, 1, 0, crc).add(derBytes(0x80, make([]byte, 32))) })
	live("no MAC in a sealed store", anySealed, atRead, "R49", func(f *forgery) { f.live(f.spare(), 4096, 1, 0, crc).remove(5) })
	live("attached with a MAC", anySealed, atRead, "R49", func(f *forgery) { f.live(f.spare(), 4096, 1, 0xff, nil).add(derBytes(0x80, make([]byte, 32))) })
	live("a MAC before the checksum", anySealed, atRead, "R1", func(f *forgery) { f.live(f.spare(), 4096, 1, 0, crc).swap(4, 5) })
	live("checksum of 5 bytes", "", atRead, "R5", func(f *forgery) { f.live(f.spare(), 4096, 1, 0, append(slices.Clone(crc), 5)) })
	live("MAC of 31 bytes", anySealed, atRead, "R5", func(f *forgery) { l := f.live(f.spare(), 4096, 1, 0, crc); l.kids[5].val = l.kids[5].val[1:] })
	live("length 0", "", atRead, "R4", func(f *forgery) { f.live(f.spare(), 0, 1, 0, crc) })
	live("length of more than 1 GiB", "", atRead, "R4", func(f *forgery) { f.live(f.spare(), 1<<30+1, 1, 0xff, nil) })
	live("too young", "", atRead, "R4", func(f *forgery) { f.live(f.spare(), 4096, 1<<40, 0, crc) })
	live("an element more", "", atRead, "R1", func(f *forgery) { f.live(f.spare(), 4096, 1, 0, crc).add(derBytes(5, nil)) })
	live("attached is 1", "", atRead, "R1", func(f *forgery) { f.live(f.spare(), 4096, 1, 1, nil) })
	live("behind the image", "", atRead, "R21", func(f *forgery) { f.live(int64(len(f.img))+1<<20, 4096, 1, 0, crc) })
	live("attached, behind the image", "", atCheck, "R21", func(f *forgery) { f.live(int64(len(f.img))+1<<20, 4096, 1, 0xff, nil) })
	live("other content", "", atRead, "R23", func(f *forgery) {
		off := f.spare()
		f.img[off+4095] = 1
		f.live(off, 4096, 1, 0, crc)
	})
	live("in a chunk's place", "", atCheck, "R22", func(f *forgery) { f.live(f.inline().at("chunks.0.offset").int(), 4096, 1, 0xff, nil) })
	live("in a node's place", "", atCheck, "R22", func(f *forgery) { f.live(f.free.off, 4096, 1, 0xff, nil) })
	live("on free space", "", atCheck, "R53", func(f *forgery) { f.live(f.free.el.at("extents.0.offset").int(), 4096, 1, 0xff, nil) })
	vs = append(vs,
		vector{"live, other content with its checksum", "R24", atRead, tampered, anySealed, func(f *forgery) {
			off := f.spare()
			f.img[off] = 1
			f.live(off, 4096, 1, 0, crcOf(f.img[off:off+4096]))
		}},
		vector{"live, MAC of another blob", "R24", atRead, tampered, anySealed, func(f *forgery) {
			f.live(f.spare(), 4096, 1, 0, crc).kids[5].val = f.liveMAC(f.inline(), make([]byte, 4096))
		}},
		vector{"live, detached", "R49", atNone, nil, "", func(f *forgery) { f.live(f.spare(), 4096, gen(f), 0, crc) }})
	return vs
}

// An attached extent is legal whatever its bytes are, and check says that it
// is.
func TestAttachedIsLegal(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		f := takeApart(t, grown(t, base(t, kind)).img, rawKey)
		off := f.spare()
		f.img[off] = 0x5a
		f.live(off, 4096, f.hollow().at("generation").int()-1, 0xff, nil)
		fs := examine(f.reseal(), options(t, kind, true))
		require.True(t, has(fs, "warning", "attached", nil), "%v", fs)
		require.False(t, has(fs, "open list get check leak", "", nil), "%v", fs)
	})
}
