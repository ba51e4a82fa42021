package luks_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

func keyOptions(old, fresh string) *luks.KeyOptions {
	return &luks.KeyOptions{Passphrase: []byte(old), NewPassphrase: []byte(fresh), PBKDF2: true, Iterations: 1000}
}

func opens(d image.Device, p string) bool {
	_, err := luks.Open(shared{d}, &luks.Options{Passphrase: []byte(p)})
	return err == nil
}

func TestKeySlots(t *testing.T) {
	for _, version := range []int{1, 2} {
		m := imagetest.NewMemory(0)
		d, err := luks.Format(shared{m}, cheap(luks.FormatOptions{Version: version, Size: 8192}))
		require.NoError(t, err)
		want := pattern(8192, 1)
		_, err = d.WriteAt(want, 0)
		require.NoError(t, err)

		all := 8 // LUKS1 has no more
		for n := 1; n < all; n++ {
			got, err := luks.AddKey(m, keyOptions(string(pass), fmt.Sprint("pass ", n)))
			require.NoError(t, err)
			require.Equal(t, n, got)
		}
		if version == 1 {
			_, err = luks.AddKey(m, keyOptions(string(pass), "one more"))
			require.ErrorIs(t, err, image.ErrNoSpace)
		}
		require.NoError(t, luks.RemoveKey(m, 3))
		require.ErrorIs(t, luks.RemoveKey(m, 3), image.ErrNotFound)
		require.ErrorIs(t, luks.RemoveKey(m, 99), image.ErrNotFound)
		require.False(t, opens(m, "pass 3"))
		n, err := luks.ChangeKey(m, keyOptions("pass 5", "pass five"))
		require.NoError(t, err)
		require.Equal(t, 3, n, "the free one")
		require.False(t, opens(m, "pass 5"))
		for _, p := range []string{string(pass), "pass 1", "pass 2", "pass 4", "pass five", "pass 6", "pass 7"} {
			d, err := luks.Open(shared{m}, &luks.Options{Passphrase: []byte(p)})
			require.NoError(t, err, p)
			require.NoError(t, d.Info().Damaged)
			got := make([]byte, 8192)
			require.NoError(t, image.ReadFull(d, got, 0))
			require.Equal(t, want, got, p)
		}

		_, err = luks.AddKey(m, keyOptions("wrong", "x"))
		require.ErrorIs(t, err, luks.ErrPassphrase)
		_, err = luks.AddKey(m, keyOptions(string(pass), ""))
		require.Error(t, err)
		for _, n := range []int{1, 2, 3, 4, 6, 7} {
			require.NoError(t, luks.RemoveKey(m, n))
		}
		require.ErrorIs(t, luks.RemoveKey(m, 0), luks.ErrLastSlot)
		require.True(t, opens(m, string(pass)))
	}
}

// TestChangeKeyCrash cuts the power at every write of a change of passphrase:
// one of the two always opens the image, and nothing else does.
func TestChangeKeyCrash(t *testing.T) {
	for _, version := range []int{1, 2} {
		c := imagetest.NewCrash(0, nil)
		_, err := luks.Format(shared{c}, cheap(luks.FormatOptions{Version: version, Size: 4096}))
		require.NoError(t, err)
		start := c.Len()
		_, err = luks.ChangeKey(c, keyOptions(string(pass), "fresh"))
		require.NoError(t, err)
		seed := imagetest.Seed(t)
		var old, fresh int
		for at := start; at <= c.Len(); at++ {
			for st := range c.CrashStates(at, &imagetest.StateConfig{Samples: imagetest.Scale(6), Seed: seed}) {
				d := st.Open()
				a, b := opens(d, string(pass)), opens(d, "fresh")
				require.True(t, a || b, "LUKS%d, %v", version, st)
				if a {
					old++
				}
				if b {
					fresh++
				}
				require.False(t, opens(d, "other"))
			}
		}
		require.Positive(t, old)
		require.Positive(t, fresh)
		require.False(t, opens(c, string(pass)))
	}
}

// TestCryptsetupKeepsKeys: cryptsetup opens what AddKey and ChangeKey made, and
// tokens outlive them.
func TestCryptsetupKeepsKeys(t *testing.T) {
	for _, version := range []int{1, 2} {
		dir := t.TempDir()
		path, key := filepath.Join(dir, "i"), keyFile(t, dir)
		d, err := luks.Format(newFile(t, path), cheap(luks.FormatOptions{Version: version, Size: 1 << 20}))
		require.NoError(t, err)
		require.NoError(t, d.Close())
		if version == 2 {
			run(t, "sh", "-c", `echo '{"type":"test-kind","keyslots":["0"],"n":18446744073709551615}' | cryptsetup token import `+path)
		}
		f := openFile(t, path)
		_, err = luks.AddKey(f, keyOptions(string(pass), "second"))
		require.NoError(t, err)
		_, err = luks.ChangeKey(f, keyOptions("second", "third"))
		require.NoError(t, err)
		require.True(t, opens(f, "third"))
		i, err := luks.Inspect(f)
		require.NoError(t, err)
		require.Len(t, i.Slots, 2)
		if version == 2 {
			require.Equal(t, map[string]string{"0": "test-kind"}, i.Tokens)
		}
		require.NoError(t, f.Close())
		run(t, "cryptsetup", "open", "--test-passphrase", path, "-d", key)
		run(t, "sh", "-c", "printf third | cryptsetup open --test-passphrase "+path+" -d -")
		fails(t, "sh", "-c", "printf second | cryptsetup open --test-passphrase "+path+" -d -")
		if version == 1 {
			run(t, "qemu-img", "convert", "--object", "secret,id=s,data=third", "--image-opts", qemuLUKS(path), "-O", "raw", path+".raw")
		}
	}
}

// TestHostileSlot: a key slot that asks for too much is left out. Whoever has
// another's passphrase gets in, and nobody else is told that theirs is wrong.
func TestHostileSlot(t *testing.T) {
	m := imagetest.NewMemory(0)
	_, err := luks.Format(shared{m}, cheap(luks.FormatOptions{Version: 1, Size: 4096}))
	require.NoError(t, err)
	_, err = luks.AddKey(m, keyOptions(string(pass), "second"))
	require.NoError(t, err)
	_, err = m.WriteAt(u32(1<<32-1), slotAt+4)
	require.NoError(t, err)
	require.True(t, opens(m, "second"))
	_, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass})
	require.ErrorIs(t, err, luks.ErrBudget)
	require.ErrorContains(t, err, "key slot 0")
}
