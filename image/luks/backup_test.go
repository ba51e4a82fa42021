package luks_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

// backup returns a copy of a header.
func backup(t testing.TB, d image.Device) []byte {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, luks.BackupHeader(d, &b))
	return b.Bytes()
}

// TestBackupIsCryptsetups: each reads the other's backups, and both make the
// same bytes.
func TestBackupIsCryptsetups(t *testing.T) {
	for _, o := range []luks.FormatOptions{{Version: 1}, {Version: 1, Encryption: "aes-cbc-plain64", KeySize: 24}, {Version: 2}} {
		dir := t.TempDir()
		path, key, theirs, ours := filepath.Join(dir, "i"), keyFile(t, dir), filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
		o.Size = 1 << 20
		d, err := luks.Format(newFile(t, path), cheap(o))
		require.NoError(t, err)
		want := pattern(1<<20, 3)
		_, err = d.WriteAt(want, 0)
		require.NoError(t, err)
		require.NoError(t, d.Close())
		run(t, "cryptsetup", "luksHeaderBackup", path, "--header-backup-file", theirs)
		f := openFile(t, path)
		b := backup(t, f)
		p, err := os.ReadFile(theirs)
		require.NoError(t, err)
		require.True(t, bytes.Equal(p, b), "%d bytes, %d of cryptsetup's", len(b), len(p))
		require.NoError(t, os.WriteFile(ours, b, 0o600))

		// The header is lost.
		_, err = f.WriteAt(make([]byte, 300<<10), 0)
		require.NoError(t, err)
		require.False(t, opens(f, string(pass)))
		require.ErrorIs(t, luks.RestoreHeader(f, memory(t, p), false), luks.ErrOther)
		require.NoError(t, luks.RestoreHeader(f, memory(t, p), true))
		require.NoError(t, f.Close())
		requirePlain(t, want, readAll(t, path, luks.Options{}))
		run(t, "cryptsetup", "open", "--test-passphrase", path, "-d", key)

		run(t, "truncate", "-s", "0", path)
		run(t, "truncate", "-s", "20M", path)
		run(t, "cryptsetup", "luksHeaderRestore", "-q", path, "--header-backup-file", ours)
		run(t, "cryptsetup", "open", "--test-passphrase", path, "-d", key)
	}
}

// TestRestore: a restored header opens with the passphrases of its time, and
// isn't put over another image's.
func TestRestore(t *testing.T) {
	for _, version := range []int{1, 2} {
		m := imagetest.NewMemory(0)
		d, err := luks.Format(shared{m}, cheap(luks.FormatOptions{Version: version, Size: 8192}))
		require.NoError(t, err)
		want := pattern(8192, 1)
		_, err = d.WriteAt(want, 0)
		require.NoError(t, err)
		b := backup(t, m)
		_, err = luks.ChangeKey(m, keyOptions(string(pass), "later"))
		require.NoError(t, err)
		require.False(t, opens(m, string(pass)))
		require.NoError(t, luks.RestoreHeader(m, memory(t, b), false))
		require.False(t, opens(m, "later"))
		d, err = luks.Open(shared{m}, &luks.Options{Passphrase: pass})
		require.NoError(t, err)
		got := make([]byte, 8192)
		require.NoError(t, image.ReadFull(d, got, 0))
		require.Equal(t, want, got)

		// Again: nothing is written.
		w := imagetest.NewFault(shared{m}, imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpChange, Forever: true})
		require.NoError(t, luks.RestoreHeader(w, memory(t, b), false))

		before := backup(t, m)
		other := func(o luks.FormatOptions) image.Device {
			o.Version, o.Size = version, 8192
			x := imagetest.NewMemory(0)
			_, err := luks.Format(shared{x}, cheap(o))
			require.NoError(t, err)
			return x
		}
		require.ErrorIs(t, luks.RestoreHeader(m, memory(t, backup(t, other(luks.FormatOptions{}))), false), luks.ErrOther, "UUID")
		require.ErrorIs(t, luks.RestoreHeader(m, memory(t, backup(t, other(luks.FormatOptions{KeySize: 32}))), true), luks.ErrOther, "key size")
		require.ErrorIs(t, luks.RestoreHeader(m, memory(t, backup(t, other(luks.FormatOptions{Encryption: "aes-cbc-plain64"}))), true), luks.ErrOther)
		require.ErrorIs(t, luks.RestoreHeader(m, memory(t, b[:len(b)-1]), true), luks.ErrTruncated)
		require.ErrorIs(t, luks.RestoreHeader(m, memory(t, make([]byte, len(b))), true), image.ErrFormat)
		require.ErrorIs(t, luks.RestoreHeader(imagetest.NewMemory(8192), memory(t, b), true), image.ErrNoSpace)
		require.True(t, bytes.Equal(before, backup(t, m)), "what was refused changed nothing")
		short := imagetest.NewMemory(8192)
		_, err = short.WriteAt(b[:8192], 0)
		require.NoError(t, err)
		require.ErrorIs(t, luks.BackupHeader(short, new(bytes.Buffer)), luks.ErrTruncated)

		require.NoError(t, luks.RestoreHeader(m, memory(t, backup(t, other(luks.FormatOptions{Passphrase: []byte("x")}))), true))
		require.True(t, opens(m, "x"), "another image's, by force")
	}
}

// TestRestoreCrash cuts the power at every write of a restore: done again, it
// is whole.
func TestRestoreCrash(t *testing.T) {
	for _, version := range []int{1, 2} {
		c := imagetest.NewCrash(0, nil)
		_, err := luks.Format(shared{c}, cheap(luks.FormatOptions{Version: version, Size: 4096}))
		require.NoError(t, err)
		b := memory(t, backup(t, c))
		_, err = luks.ChangeKey(c, keyOptions(string(pass), "later"))
		require.NoError(t, err)
		start := c.Len()
		require.NoError(t, luks.RestoreHeader(c, b, false))
		seed := imagetest.Seed(t)
		for at := start; at <= c.Len(); at++ {
			for st := range c.CrashStates(at, &imagetest.StateConfig{Samples: imagetest.Scale(3), Seed: seed}) {
				d := st.Open()
				require.NoError(t, luks.RestoreHeader(d, b, true), "LUKS%d, %v", version, st)
				require.True(t, opens(d, string(pass)), "LUKS%d, %v", version, st)
			}
		}
	}
}

func TestRepairHeader(t *testing.T) {
	for _, at := range []int{0, v2Second} {
		p := sound2(t)
		text := text2(p)
		m := memory(t, p)
		repaired, err := luks.RepairHeader(m)
		require.NoError(t, err)
		require.False(t, repaired, "nothing to do")
		_, err = m.WriteAt([]byte("damage"), int64(at)+5000)
		require.NoError(t, err)
		repaired, err = luks.RepairHeader(m)
		require.NoError(t, err)
		require.True(t, repaired)
		i, err := luks.Inspect(m)
		require.NoError(t, err)
		require.NoError(t, i.Damaged)
		require.NoError(t, image.ReadFull(m, p, 0))
		require.Equal(t, text, text2(p), "the metadata is as it was")
		require.True(t, opens(m, string(pass)))
	}
	repaired, err := luks.RepairHeader(memory(t, sound1(t)))
	require.NoError(t, err)
	require.False(t, repaired)
}
