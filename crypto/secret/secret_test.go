package secret_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/secret"
)

func file(t *testing.T, content []byte) string {
	path := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(path, content, 0o600))
	return path
}

// fdOf returns the reading end of a pipe that holds content and ends.
func fdOf(t *testing.T, content []byte) int {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { r.Close() })
	_, err = w.Write(content)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return int(r.Fd())
}

func TestPassphrase(t *testing.T) {
	long := strings.Repeat("x", 1024)
	for _, c := range []struct {
		name, content, want string
		err                 error
	}{
		{"plain", "pass", "pass", nil},
		{"one newline", "pass\n", "pass", nil},
		{"CR LF", "pass\r\n", "pass", nil},
		{"two newlines", "pass\n\n", "pass\n", nil},
		{"lone CR", "pass\r", "pass\r", nil},
		{"spaces stay", " pass \n", " pass ", nil},
		{"zero byte stays", "pa\x00ss\n", "pa\x00ss", nil},
		{"several lines", "one\ntwo\n", "one\ntwo", nil},
		{"empty", "", "", secret.ErrEmpty},
		{"only a newline", "\n", "", secret.ErrEmpty},
		{"only CR LF", "\r\n", "", secret.ErrEmpty},
		{"longest", long, long, nil},
		{"longest and CR LF", long + "\r\n", long, nil},
		{"one too many", long + "x", "", secret.ErrTooLong},
		{"one too many, newline", long + "x\n", "", secret.ErrTooLong},
		{"longest, two newlines", long + "\n\n", "", secret.ErrTooLong},
		{"much too long", strings.Repeat("x", 60000), "", secret.ErrTooLong},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, read := range []func() (*secret.Secret, error){
				func() (*secret.Secret, error) { return secret.ReadFile(file(t, []byte(c.content))) },
				func() (*secret.Secret, error) { return secret.ReadFD(fdOf(t, []byte(c.content))) },
			} {
				s, err := read()
				require.ErrorIs(t, err, c.err)
				if c.err != nil {
					require.Nil(t, s)
					continue
				}
				require.Equal(t, c.want, string(s.Bytes()))
			}
		})
	}
}

func TestKeyFile(t *testing.T) {
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i * 7)
	}
	ends := bytes.Clone(key)
	ends[31] = '\n' // a raw key may well end in what looks like a newline
	digits := hex.EncodeToString(key)
	for _, c := range []struct {
		name    string
		content string
		want    []byte
		err     error
	}{
		{"raw", string(key), key, nil},
		{"raw, ends in newline", string(ends), ends, nil},
		{"hex", digits, key, nil},
		{"hex, newline", digits + "\n", key, nil},
		{"hex, CR LF", digits + "\r\n", key, nil},
		{"hex, upper case", strings.ToUpper(digits) + "\n", key, nil},
		{"hex, two newlines", digits + "\n\n", nil, secret.ErrKeyFile},
		{"hex, not a digit", "g" + digits[1:], nil, secret.ErrKeyFile},
		{"hex, 62 digits", digits[2:], nil, secret.ErrKeyFile},
		{"raw, 31 bytes", string(key[1:]), nil, secret.ErrKeyFile},
		{"raw, newline behind", string(key) + "\n", nil, secret.ErrKeyFile},
		{"64 bytes that aren't hex", string(key) + string(key), nil, secret.ErrKeyFile},
		{"empty", "", nil, secret.ErrEmpty},
		{"long", strings.Repeat("a", 4000), nil, secret.ErrKeyFile},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, read := range []func() (*secret.Secret, error){
				func() (*secret.Secret, error) { return secret.ReadKeyFile(file(t, []byte(c.content))) },
				func() (*secret.Secret, error) { return secret.ReadKeyFD(fdOf(t, []byte(c.content))) },
			} {
				s, err := read()
				require.ErrorIs(t, err, c.err)
				if c.err != nil {
					require.Nil(t, s)
					require.NotContains(t, err.Error(), digits[:8])
					continue
				}
				require.Equal(t, c.want, s.Bytes())
			}
		})
	}
}

func TestSourcesThatFail(t *testing.T) {
	_, err := secret.ReadFile(filepath.Join(t.TempDir(), "none"))
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = secret.ReadFile(t.TempDir())
	require.ErrorIs(t, err, syscall.EISDIR)
	_, err = secret.ReadFile("/dev/zero")
	require.ErrorIs(t, err, secret.ErrTooLong)
	for _, fd := range []int{-1, 9999} {
		_, err = secret.ReadFD(fd)
		require.ErrorIs(t, err, syscall.EBADF)
	}
}

func TestReadFDLeavesItOpen(t *testing.T) {
	f, err := os.Open(file(t, []byte("pass\n")))
	require.NoError(t, err)
	defer f.Close()
	_, err = secret.ReadFD(int(f.Fd()))
	require.NoError(t, err)
	_, err = f.Stat()
	require.NoError(t, err)
}

func TestExposed(t *testing.T) {
	path := file(t, []byte("pass"))
	for mode, want := range map[fs.FileMode]bool{0o600: false, 0o400: false, 0o610: false, 0o640: true, 0o604: true, 0o644: true} {
		require.NoError(t, os.Chmod(path, mode))
		got, err := secret.Exposed(path)
		require.NoError(t, err)
		require.Equal(t, want, got, "%o", mode)
	}
	got, err := secret.Exposed("/dev/null")
	require.NoError(t, err)
	require.False(t, got)
	_, err = secret.Exposed(path + "x")
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func TestNothingPrintsASecret(t *testing.T) {
	s := secret.New([]byte("hunter2"))
	for _, v := range []any{s, *s, []*secret.Secret{s}, struct{ S secret.Secret }{*s}, map[string]*secret.Secret{"k": s}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			out := fmt.Sprintf(verb, v)
			require.NotContains(t, out, "hunter2")
			require.NotContains(t, strings.ToLower(out), hex.EncodeToString([]byte("hunter2")))
			require.NotContains(t, out, "104")
		}
		_, err := json.Marshal(v)
		require.True(t, errors.Is(err, secret.ErrNoPrint), "%T: %v", v, err)
	}
	_, err := xml.Marshal(s)
	require.ErrorIs(t, err, secret.ErrNoPrint)
}

func TestWipe(t *testing.T) {
	b := []byte("hunter2")
	s := secret.New(b)
	s.Wipe()
	require.Equal(t, make([]byte, 7), b)
	require.Nil(t, s.Bytes())
	s.Wipe()
	(*secret.Secret)(nil).Wipe()
}

func TestReadBlob(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, c := range []struct {
		size int
		want error
	}{{0, secret.ErrEmpty}, {1, nil}, {4096, nil}, {secret.MaxBlob, nil}, {secret.MaxBlob + 1, secret.ErrTooLong}} {
		p := bytes.Repeat([]byte("\n"), c.size)
		require.NoError(t, os.WriteFile(path, p, 0o600))
		s, err := secret.ReadBlob(path)
		require.ErrorIs(t, err, c.want)
		if c.want == nil {
			require.True(t, bytes.Equal(p, s.Bytes()), "newlines count")
			s.Wipe()
		} else {
			require.Nil(t, s)
		}
	}
	_, err := secret.ReadBlob(path + ".none")
	require.ErrorIs(t, err, os.ErrNotExist)
}
