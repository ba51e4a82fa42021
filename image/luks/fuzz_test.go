package luks_test

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/json"
	"hash"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
)

// small is a budget for images that want much.
var small = &luks.Budget{Rounds: 5000}

// FuzzHeaderV1: what is taken apart can be put together again, and whatever is
// wrong is an error.
func FuzzHeaderV1(f *testing.F) {
	whole := sound1(f)
	f.Add(whole[:luks.V1HeaderSize])
	for _, c := range faults1() {
		p := append([]byte{}, whole[:luks.V1HeaderSize]...)
		copy(p[min(c.at, len(p)):], c.put)
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 4096 {
			return
		}
		if len(p) >= luks.V1HeaderSize {
			p := p[:luks.V1HeaderSize]
			if q := luks.ReencodeV1(p); q != nil {
				require.Equal(t, p, q)
			}
		}
		m := memory(t, p)
		i, err := luks.Inspect(m)
		if err != nil {
			require.Nil(t, i)
			return
		}
		require.LessOrEqual(t, len(i.Slots), 32)
		d, err := luks.Open(m, &luks.Options{Passphrase: pass, Header: m, Budget: small})
		require.Error(t, err, "no key area")
		require.Nil(t, d)
		require.NotErrorIs(t, err, luks.ErrPassphrase)
	})
}

// FuzzHeaderV2 has headers whose checksums are right and whose binary part and
// JSON are anyone's.
func FuzzHeaderV2(f *testing.F) {
	whole := sound2(f)
	f.Add(whole[:512], []byte(text2(whole)))
	for _, c := range faults2() {
		f.Add(whole[:512], bytes.Replace([]byte(text2(whole)), []byte(c.old), []byte(c.new), 1))
	}
	f.Fuzz(func(t *testing.T, bin, text []byte) {
		if len(bin) > 512 || len(text) > 12288 {
			return
		}
		p := make([]byte, 64<<10)
		copy(p, bin)
		copy(p[v2Second:], bin)
		copy(p[v2Second:], "SKUL\xba\xbe")
		copy(p[v2Second+256:], u64(v2Second))
		setText(p, string(text))
		for _, off := range []int64{0, v2Second} {
			b := p[off : off+luks.V2BinSize]
			if q := luks.ReencodeBin(b, off); q != nil {
				// Bytes that mean nothing aren't kept.
				require.Equal(t, b[:256], q[:256])
				require.Equal(t, b[448:512], q[448:512])
			}
		}
		m := memory(t, p)
		i, err := luks.Inspect(m)
		if err != nil {
			require.Nil(t, i)
			return
		}
		d, err := luks.Open(m, &luks.Options{Passphrase: pass, Header: m, Budget: small})
		if err == nil {
			require.Zero(t, d.Size()%512)
			_, _ = d.ReadAt(make([]byte, 5000), 3)
		} else {
			require.Nil(t, d)
		}
	})
}

// FuzzJSON: whatever is taken is what encoding/json makes of it.
func FuzzJSON(f *testing.F) {
	f.Add([]byte(text2(sound2(f))))
	for _, s := range []string{`{}`, `[]`, `{"a":{"a":[1,"2",null,true,1e9]}}`, `{"a":1,"a":2}`, `{"a":1}{"a":2}`, "{\"\xff\":1}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		m := luks.ParseJSON(p)
		if m == nil {
			return
		}
		dec := json.NewDecoder(bytes.NewReader(p))
		dec.UseNumber()
		var want map[string]any
		require.NoError(t, dec.Decode(&want))
		require.Equal(t, want, m)
	})
}

// FuzzSplitter: merging undoes splitting, and takes any bytes.
func FuzzSplitter(f *testing.F) {
	f.Add([]byte("0123456789abcdef0123456789abcdef"), uint8(40), true)
	f.Add([]byte{1}, uint8(1), false)
	f.Add(make([]byte, 33), uint8(2), false)
	f.Fuzz(func(t *testing.T, p []byte, n uint8, short bool) {
		if len(p) == 0 || len(p) > 4096 || n == 0 {
			return
		}
		var h func() hash.Hash = sha256.New
		if short {
			h = sha1.New
		}
		split := luks.Split(h, p, int(n))
		require.Len(t, split, len(p)*int(n))
		require.Equal(t, p, luks.Merge(h, split, int(n)))
		if n > 1 && len(p) >= 16 { // a byte may be right by chance
			split[len(split)/2] ^= 1
			require.NotEqual(t, p, luks.Merge(h, split, int(n)))
		}
		if len(p)%int(n) == 0 {
			require.Len(t, luks.Merge(h, p, int(n)), len(p)/int(n))
		}
	})
}

var _ image.Device = (*luks.Device)(nil)
