package luks_test

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

// A fault1 is one thing wrong with a LUKS1 image that is sound otherwise: its
// size is 4 MiB, its only key slot the first, its key 64 bytes.
type fault1 struct {
	name string
	at   int
	put  []byte
	want error  // nil: it opens
	text string // in the error
	peer bool   // cryptsetup opens it
}

func u16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func u32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func u64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// text32 is a field of 32 bytes.
func text32(s string) []byte { return append([]byte(s), make([]byte, 32-len(s))...) }

var noNUL = []byte("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")

const (
	slotAt  = 208
	slotLen = 48
)

// skipPeer marks faults that make cryptsetup work for hours.
const skipPeer = "budget"

func faults1() []fault1 {
	bad, unsup, form := image.ErrCorrupt, image.ErrUnsupported, image.ErrFormat
	s7 := slotAt + 7*slotLen
	return []fault1{
		{"sound", 0, nil, nil, "", true},
		{"magic first byte", 0, []byte{'l'}, form, "magic", false},
		{"magic last byte", 5, []byte{0xbf}, form, "magic", false},
		{"magic of a second header", 0, []byte("SKUL"), form, "magic", false},
		{"version 0", 6, u16(0), unsup, "version", false},
		{"version 2", 6, u16(2), bad, "hdr_size", false},
		{"version 3", 6, u16(3), unsup, "version", false},
		{"version 0x100", 6, u16(0x100), unsup, "version", false},
		{"version 0xffff", 6, u16(0xffff), unsup, "version", false},
		{"cipher without end", 8, noNUL[:32], bad, "cipher_name", false},
		{"cipher empty", 8, text32(""), bad, "cipher_name", false},
		{"cipher unknown", 8, text32("camellia"), unsup, `"camellia-xts-plain64"`, false},
		{"other cipher", 8, text32("serpent"), luks.ErrPassphrase, "", false},
		{"cipher of short blocks", 8, text32("cast5"), unsup, "blocks of 16 bytes", false},
		{"cipher null", 8, text32("cipher_null"), unsup, "a cipher that encrypts", false},
		{"cipher in capitals", 8, text32("AES"), unsup, "cipher aes, serpent", true},
		{"cipher with a mode", 8, text32("aes-cbc"), unsup, "IV", false},
		{"bytes after the cipher", 8 + 20, []byte("x"), nil, "", true},
		{"mode without end", 40, noNUL[:32], bad, "cipher_mode", false},
		{"mode empty", 40, text32(""), bad, "cipher_mode", false},
		{"mode unknown", 40, text32("lrw-benbi"), unsup, "mode", false},
		{"mode without IV", 40, text32("xts"), unsup, "IV", false},
		{"mode with empty IV", 40, text32("xts-"), unsup, "IV", false},
		{"IV null", 40, text32("xts-null"), unsup, "IV", false},
		{"IV big endian", 40, text32("xts-plain64be"), unsup, "IV", false},
		{"IV essiv without hash", 40, text32("xts-essiv"), unsup, "hash for essiv", false},
		{"IV essiv with unknown hash", 40, text32("xts-essiv:x"), unsup, "hash for essiv", false},
		{"IV essiv with long hash", 40, text32("xts-essiv:sha512"), unsup, "as long as", false},
		{"mode that takes other keys", 40, text32("cbc-plain64"), unsup, "key_bytes", false},
		{"other mode", 40, text32("xts-essiv:sha256"), luks.ErrPassphrase, "", false},
		{"hash without end", 72, noNUL[:32], bad, "hash_spec", false},
		{"hash empty", 72, text32(""), bad, "hash_spec", false},
		{"hash unknown", 72, text32("whirlpool"), unsup, "hash_spec", false},
		{"hash in capitals", 72, text32("SHA256"), unsup, "hash_spec", true},
		{"other hash", 72, text32("sha1"), luks.ErrPassphrase, "", false},
		{"payload 0", 104, u32(0), unsup, "detached", true},
		{"payload 1", 104, u32(1), bad, "payload_offset", false},
		{"payload 7", 104, u32(7), bad, "payload_offset", false},
		{"payload 8", 104, u32(8), bad, "key_material_offset", false},
		{"payload inside the last area", 104, u32(8 + 7*504 + 499), bad, "slot[7].key_material_offset", false},
		{"payload right after the last area", 104, u32(8 + 7*504 + 500), nil, "", true},
		{"payload at the end", 104, u32(8192), nil, "", true},
		{"payload past the end", 104, u32(8193), luks.ErrTruncated, "payload", true},
		{"payload 2^32-1", 104, u32(1<<32 - 1), luks.ErrTruncated, "payload", true},
		{"key of 0", 108, u32(0), bad, "key_bytes", false},
		{"key of 1", 108, u32(1), unsup, "key_bytes", false},
		{"key of 16", 108, u32(16), unsup, "key_bytes", false},
		{"key of 63", 108, u32(63), unsup, "key_bytes", false},
		{"key of 65", 108, u32(65), unsup, "key_bytes", false},
		{"key of 32", 108, u32(32), luks.ErrPassphrase, "", false},
		{"key of 513", 108, u32(513), bad, "key_bytes", false},
		{"key of 2^31", 108, u32(1 << 31), bad, "key_bytes", false},
		{"key of 2^32-1", 108, u32(1<<32 - 1), bad, "key_bytes", false},
		{"digest", 112, []byte{1, 2}, luks.ErrPassphrase, "", false},
		{"digest's salt", 132, []byte{1, 2}, luks.ErrPassphrase, "", false},
		{"no digest iterations", 164, u32(0), bad, "mk_digest_iter", false},
		{"one digest iteration", 164, u32(1), luks.ErrPassphrase, "", false},
		{"2^32-1 digest iterations", 164, u32(1<<32 - 1), luks.ErrBudget, skipPeer, false},
		{"uuid without end", 168, noNUL[:40], nil, "", true},
		{"state 0", slotAt, u32(0), bad, "slot[0].active", false},
		{"state of garbage", slotAt, u32(0xac71f2), bad, "slot[0].active", false},
		{"slot 0 off", slotAt, u32(0xdead), luks.ErrNoSlot, "", false},
		{"slot 7 on", s7, u32(0xac71f3), bad, "slot[7].iterations", true},
		{"slot 7 of garbage", s7, u32(0xdeadbeef), bad, "slot[7].active", true},
		{"no iterations", slotAt + 4, u32(0), bad, "slot[0].iterations", false},
		{"one iteration", slotAt + 4, u32(1), luks.ErrPassphrase, "", false},
		{"2^32-1 iterations", slotAt + 4, u32(1<<32 - 1), luks.ErrBudget, skipPeer, false},
		{"iterations of a slot that is off", s7 + 4, u32(77), nil, "", true},
		{"salt", slotAt + 8, []byte{1, 2}, luks.ErrPassphrase, "", false},
		{"area in the header", slotAt + 40, u32(1), bad, "slot[0].key_material_offset", false},
		{"area at 0", slotAt + 40, u32(0), bad, "slot[0].key_material_offset", false},
		{"area on the next", slotAt + 40, u32(9 + 4), bad, "slot[1].key_material_offset", false},
		{"same area as the next", slotAt + 40, u32(8 + 504), bad, "slot[1].key_material_offset", false},
		{"area of a slot that is off on another", s7 + 40, u32(8 + 504), bad, "slot[7].key_material_offset", false},
		{"area in the payload", slotAt + 40, u32(5000), bad, "slot[0].key_material_offset", false},
		{"area past 32 bits", slotAt + 40, u32(0xfffffff0), bad, "slot[0].key_material_offset", false},
		{"area at 2^32-1", slotAt + 40, u32(1<<32 - 1), bad, "slot[0].key_material_offset", false},
		{"area of slot 7 past 32 bits", s7 + 40, u32(0xfffffff0), bad, "slot[7].key_material_offset", false},
		{"no stripes", slotAt + 44, u32(0), bad, "slot[0].stripes", false},
		{"3999 stripes", slotAt + 44, u32(3999), bad, "slot[0].stripes", false},
		{"2^32-1 stripes", slotAt + 44, u32(1<<32 - 1), bad, "slot[0].stripes", false},
		{"4001 stripes in slot 7", s7 + 44, u32(4001), bad, "slot[7].stripes", false},
		{"key area, first byte", 4096, []byte{0xAA, 0x55}, luks.ErrPassphrase, "", false},
		{"key area, last byte", 4096 + 256000 - 2, []byte{0xAA, 0x55}, luks.ErrPassphrase, "", false},
		{"after the key area", 4096 + 256000, []byte{0xAA, 0x55}, nil, "", true},
	}
}

// sound1 is the image that faults1 are made in.
func sound1(t testing.TB) []byte {
	t.Helper()
	m := imagetest.NewMemory(4 << 20)
	_, err := luks.Format(m, cheap(luks.FormatOptions{Version: 1}))
	require.NoError(t, err)
	p := make([]byte, 4<<20)
	require.NoError(t, image.ReadFull(m, p, 0))
	return p
}

func memory(t testing.TB, p []byte) image.Device {
	t.Helper()
	m := imagetest.NewMemory(int64(len(p)))
	if len(p) > 0 {
		_, err := m.WriteAt(p, 0)
		require.NoError(t, err)
	}
	return m
}

// peerOpens tells whether cryptsetup opens an image with the passphrase.
func peerOpens(t testing.TB, p []byte) bool {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "i")
	require.NoError(t, os.WriteFile(path, p, 0o600))
	err := exec.Command("cryptsetup", "open", "--test-passphrase", path, "-d", keyFile(t, dir)).Run()
	return err == nil
}

// qemuDiffers are the faults that QEMU 7.2 lets pass and this package doesn't,
// and the other way round.
var qemuDiffers = map[string]bool{
	"payload right after the last area": true, // it wants areas in units of 4096 bytes
	"area of slot 7 past 32 bits":       true, // it computes in 32 bits
}

// qemuOpens tells whether QEMU opens a LUKS1 image with the passphrase.
func qemuOpens(t testing.TB, p []byte) bool {
	t.Helper()
	path := filepath.Join(t.TempDir(), "i")
	require.NoError(t, os.WriteFile(path, p, 0o600))
	return exec.Command("qemu-io", "-r", "--object", qemuSecret(), "--image-opts", qemuLUKS(path), "-c", "length").Run() == nil
}

func TestFaultsV1(t *testing.T) {
	whole := sound1(t)
	require.GreaterOrEqual(t, len(faults1()), 61)
	for _, f := range faults1() {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			p := append([]byte{}, whole...)
			copy(p[f.at:], f.put)
			_, err := luks.Open(memory(t, p), &luks.Options{Passphrase: pass, Path: "the.img"})
			if f.want == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, f.want)
				if f.text != skipPeer {
					require.ErrorContains(t, err, f.text)
				}
			}
			if f.text != skipPeer && !testing.Short() {
				require.Equal(t, f.peer, peerOpens(t, p), "cryptsetup")
				require.Equal(t, (f.want == nil) != qemuDiffers[f.name], qemuOpens(t, p), "QEMU")
			}
		})
	}
}

// TestTruncatedV1 cuts an image at every place that matters. What is missing
// is never taken for a wrong passphrase.
func TestTruncatedV1(t *testing.T) {
	whole := sound1(t)
	for _, c := range []struct {
		size int
		want error
	}{
		{0, image.ErrFormat}, {1, image.ErrFormat}, {7, image.ErrFormat}, {8, luks.ErrTruncated},
		{207, luks.ErrTruncated}, {591, luks.ErrTruncated}, {592, luks.ErrTruncated}, {4096, luks.ErrTruncated},
		{4097, luks.ErrTruncated}, {100_000, luks.ErrTruncated}, {4096 + 255_999, luks.ErrTruncated},
		{4096 + 256_000, luks.ErrTruncated}, {2<<20 - 1, luks.ErrTruncated}, {2 << 20, nil}, {2<<20 + 511, nil},
	} {
		for _, p := range [][]byte{pass, []byte("wrong")} {
			d, err := luks.Open(memory(t, whole[:c.size]), &luks.Options{Passphrase: p})
			switch {
			case c.want != nil:
				require.ErrorIs(t, err, c.want, "cut to %d", c.size)
				require.Nil(t, d)
			case string(p) == "wrong":
				require.ErrorIs(t, err, luks.ErrPassphrase)
			default:
				require.NoError(t, err)
				require.Zero(t, d.Size())
			}
		}
		// The same with the payload elsewhere: the key area's end decides.
		_, err := luks.Open(imagetest.NewMemory(4<<20), &luks.Options{Passphrase: []byte("wrong"), Header: memory(t, whole[:c.size])})
		if c.size < 4096+256_000 {
			require.NotErrorIs(t, err, luks.ErrPassphrase, "cut to %d", c.size)
			require.Error(t, err)
		} else {
			require.ErrorIs(t, err, luks.ErrPassphrase)
		}
	}
}
