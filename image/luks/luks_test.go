package luks_test

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

var pass = []byte("correct horse")

// cheap makes options whose derivations take no time.
func cheap(o luks.FormatOptions) *luks.FormatOptions {
	if o.Passphrase == nil {
		o.Passphrase = pass
	}
	if o.Iterations == 0 {
		o.Iterations = 1000
	}
	o.PBKDF2 = o.Argon2id == kdf.Argon2id{}
	return &o
}

// A shared Device stays open when what is over it is closed.
type shared struct{ image.Device }

func (s shared) Close() error         { return nil }
func (s shared) Unwrap() image.Device { return s.Device }

func TestConformance(t *testing.T) {
	for _, o := range []luks.FormatOptions{
		{Version: 1},
		{Version: 1, Encryption: "aes-cbc-essiv:sha256"},
		{Version: 2},
		{Version: 2, SectorSize: 4096, Encryption: "aes-cbc-plain64"},
		{Version: 2, SectorSize: 1024, Encryption: "aes-xts-plain", KeySize: 32},
		{Version: 1, Encryption: "cast5-ctr-plain64"},
	} {
		t.Run(fmt.Sprintf("v%d %s %d", o.Version, o.Encryption, o.SectorSize), func(t *testing.T) {
			t.Parallel()
			under := map[image.Device]image.Device{}
			open := func(t *testing.T, d image.Device, readOnly bool) image.Device {
				m := under[d]
				require.NoError(t, d.Close())
				n, err := luks.Open(shared{m}, &luks.Options{Passphrase: pass, ReadOnly: readOnly})
				require.NoError(t, err)
				under[n] = m
				return n
			}
			imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
				m := imagetest.NewMemory(0)
				opts := o
				opts.Size = size
				d, err := luks.Format(shared{m}, cheap(opts))
				require.NoError(t, err)
				under[d] = m
				return d
			}, &imagetest.ConformanceOptions{
				Granule: max(512, int64(o.SectorSize)),
				Garbage: true,
				Reopen: func(t *testing.T, d image.Device) image.Device {
					return open(t, d, false)
				},
				ReadOnly: func(t *testing.T, d image.Device) image.Device {
					return open(t, d, true)
				},
			})
		})
	}
}

// TestRoundTrip opens what Format made, over all that it can make.
func TestRoundTrip(t *testing.T) {
	for _, version := range []int{1, 2} {
		for _, enc := range []string{
			"aes-xts-plain64", "aes-xts-plain", "aes-xts-essiv:sha256", "aes-cbc-plain64", "aes-cbc-plain",
			"aes-cbc-essiv:sha256", "aes-cbc-essiv:md5", "aes-ctr-plain64", "aes-ecb-plain64",
			"serpent-xts-essiv:sha256", "serpent-cbc-plain", "twofish-xts-plain64", "twofish-cbc-essiv:md5",
			"cast5-cbc-essiv:md5", "cast5-ctr-plain", "cast5-ecb-plain64",
		} {
			cipher, mode, _ := strings.Cut(enc, "-")
			for _, keySize := range []int{16, 24, 32, 48, 64} {
				if xts := mode[:3] == "xts"; xts != (keySize > 32) && keySize != 32 || cipher == "cast5" && keySize != 16 {
					continue
				}
				for _, hash := range []string{"sha1", "sha256", "sha512", "ripemd160", "md5", "sha224", "sha384"} {
					if hash != "sha256" && keySize != 32 {
						continue
					}
					name := fmt.Sprintf("v%d %s %d %s", version, enc, keySize, hash)
					m := imagetest.NewMemory(0)
					d, err := luks.Format(shared{m}, cheap(luks.FormatOptions{
						Version: version, Encryption: enc, KeySize: keySize, Hash: hash, Size: 10 << 10,
					}))
					require.NoError(t, err, name)
					want := pattern(10<<10, 7)
					_, err = d.WriteAt(want, 0)
					require.NoError(t, err)
					require.NoError(t, d.Close())

					d, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass})
					require.NoError(t, err, name)
					got := make([]byte, len(want))
					require.NoError(t, image.ReadFull(d, got, 0))
					require.Equal(t, want, got, name)
					i := d.Info()
					require.Equal(t, version, i.Version)
					require.Equal(t, enc, i.Encryption)
					require.Equal(t, keySize, i.KeySize)
					require.Equal(t, hash, i.Hash)
					require.Len(t, i.Slots, 1)

					_, err = luks.Open(shared{m}, &luks.Options{Passphrase: []byte("wrong")})
					require.ErrorIs(t, err, luks.ErrPassphrase, name)
				}
			}
		}
	}
}

func pattern(n int, tag byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7+i>>8*13) ^ tag
	}
	return p
}

func TestArgon2(t *testing.T) {
	m := imagetest.NewMemory(0)
	d, err := luks.Format(shared{m}, cheap(luks.FormatOptions{Argon2id: kdf.MinArgon2id(), Size: 4096}))
	require.NoError(t, err)
	require.Equal(t, []luks.SlotInfo{{
		KDF: "argon2id", Iterations: 1, MemoryKiB: kdf.MinMemoryKiB, Cpus: 1, AreaOffset: 32768, AreaSize: 258048,
	}}, d.Info().Slots)
	_, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass})
	require.NoError(t, err)
	for _, b := range []*luks.Budget{
		{Argon2: kdf.Budget{MemoryKiB: kdf.MinMemoryKiB - 1}},
		{Argon2: kdf.Budget{Work: kdf.MinMemoryKiB - 1}},
		{Rounds: 999}, // of the digest
	} {
		_, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass, Budget: b})
		require.ErrorIs(t, err, luks.ErrBudget)
	}
	_, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass, Slots: []int{1, 2}})
	require.ErrorIs(t, err, luks.ErrNoSlot)
}

func TestDetachedHeader(t *testing.T) {
	for _, version := range []int{1, 2} {
		head, data := imagetest.NewMemory(0), imagetest.NewMemory(0)
		d, err := luks.Format(shared{data}, cheap(luks.FormatOptions{Version: version, Header: head, Size: 8192}))
		require.NoError(t, err)
		require.EqualValues(t, 8192, d.Size())
		require.EqualValues(t, 8192, data.Size(), "nothing but payload")
		want := pattern(8192, 1)
		_, err = d.WriteAt(want, 0)
		require.NoError(t, err)
		require.NoError(t, d.Close())

		d, err = luks.Open(shared{data}, &luks.Options{Passphrase: pass, Header: head})
		require.NoError(t, err)
		got := make([]byte, 8192)
		require.NoError(t, image.ReadFull(d, got, 0))
		require.Equal(t, want, got)

		_, err = luks.Open(shared{data}, &luks.Options{Passphrase: pass})
		require.ErrorIs(t, err, image.ErrFormat, "no header there")
		_, err = luks.Open(shared{head}, &luks.Options{Passphrase: pass})
		require.ErrorIs(t, err, image.ErrUnsupported)
		require.ErrorContains(t, err, "detached")
	}
}

// TestHeaderCopy opens an image, whose header is destroyed, with a copy of it.
func TestHeaderCopy(t *testing.T) {
	for _, version := range []int{1, 2} {
		m := imagetest.NewMemory(0)
		d, err := luks.Format(shared{m}, cheap(luks.FormatOptions{Version: version, Size: 4096}))
		require.NoError(t, err)
		want := pattern(4096, 2)
		_, err = d.WriteAt(want, 0)
		require.NoError(t, err)
		off := d.Info().PayloadOffset
		head := imagetest.NewMemory(off)
		_, err = io.Copy(io.NewOffsetWriter(head, 0), io.NewSectionReader(m, 0, off))
		require.NoError(t, err)
		_, err = m.WriteAt(make([]byte, off), 0)
		require.NoError(t, err)

		_, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass})
		require.ErrorIs(t, err, image.ErrFormat)
		d, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass, Header: head})
		require.NoError(t, err)
		got := make([]byte, 4096)
		require.NoError(t, image.ReadFull(d, got, 0))
		require.Equal(t, want, got)
	}
}

func TestFormatRefuses(t *testing.T) {
	for name, o := range map[string]luks.FormatOptions{
		"version":         {Version: 3},
		"empty":           {Passphrase: []byte{}},
		"few iterations":  {Iterations: 999},
		"cipher":          {Encryption: "camellia-xts-plain64"},
		"null":            {Encryption: "cipher_null-ecb"},
		"mode":            {Encryption: "aes-lrw-benbi"},
		"iv":              {Encryption: "aes-cbc-benbi"},
		"short blocks":    {Encryption: "cast5-xts-plain64"},
		"cast5's key":     {Encryption: "cast5-cbc-plain64", KeySize: 32},
		"cast5's essiv":   {Encryption: "cast5-cbc-essiv:sha256"},
		"essiv key":       {Encryption: "aes-cbc-essiv:sha1"},
		"essiv hash":      {Encryption: "aes-cbc-essiv:whirlpool"},
		"hash":            {Hash: "whirlpool"},
		"key size":        {KeySize: 33},
		"xts key size":    {KeySize: 16},
		"sector size":     {SectorSize: 8192},
		"odd sector size": {SectorSize: 1536},
		"v1 sector size":  {Version: 1, SectorSize: 4096},
		"size":            {Size: 1000},
		"argon2":          {Argon2id: kdf.Argon2id{MemoryKiB: 1, Time: 1, Parallelism: 1}},
		"uuid":            {UUID: "0123456789012345678901234567890123456"},
	} {
		m := imagetest.NewMemory(1 << 20)
		o := cheap(o)
		d, err := luks.Format(m, o)
		require.Error(t, err, name)
		require.Nil(t, d, name)
		require.EqualValues(t, 1<<20, m.Size())
	}
	// A device that can't grow.
	w, err := image.Window(imagetest.NewMemory(1<<20), 0, 1<<20)
	require.NoError(t, err)
	_, err = luks.Format(w, cheap(luks.FormatOptions{Version: 1}))
	require.Error(t, err)
}

func TestAllocationsASector(t *testing.T) {
	m := imagetest.NewMemory(0)
	d, err := luks.Format(m, cheap(luks.FormatOptions{Version: 1, Size: 64 << 10}))
	require.NoError(t, err)
	p := make([]byte, 64<<10) // 128 sectors
	const most = 30
	require.Less(t, testing.AllocsPerRun(10, func() { _, _ = d.ReadAt(p, 0) }), float64(most))
}
