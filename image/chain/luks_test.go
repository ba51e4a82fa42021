package chain_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/raw"
)

// secrets is an Options.Secret that counts what it is asked for.
type secrets struct {
	t     *testing.T
	m     map[string]string
	asked []string
	given [][]byte
}

func (s *secrets) get(name string) ([]byte, error) {
	s.asked = append(s.asked, name)
	p := []byte(s.m[name])
	s.given = append(s.given, p)
	return p, nil
}

func (s *secrets) open(location string, o chain.Options) (image.Device, error) {
	o.Secret = s.get
	d, err := chain.Open(location, &o)
	for _, p := range s.given {
		require.Zero(s.t, len(bytes.Trim(p, "\x00")), "wiped")
	}
	return d, err
}

// format makes a LUKS image on what a location names; payload is its content.
func format(t *testing.T, location string, o *chain.Options, version int, pass string, payload []byte, header string) {
	t.Helper()
	d, err := chain.Open(location, o)
	require.NoError(t, err)
	f := &luks.FormatOptions{Version: version, Passphrase: []byte(pass), PBKDF2: true, Iterations: 1000, Size: int64(len(payload))}
	if header != "" {
		h, err := raw.Create(header, 0, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, h.Close()) }()
		f.Header = h
	}
	v, err := luks.Format(d, f)
	require.NoError(t, err)
	_, err = v.WriteAt(payload, 0)
	require.NoError(t, err)
	require.NoError(t, v.Sync())
	require.NoError(t, v.Close())
}

func noise(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i>>9*7 + i*13)
	}
	return p
}

func content(t *testing.T, d image.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, p, 0))
	require.NoError(t, d.Close())
	return p
}

// TestLUKSStackIsQEMUs: LUKS in a file, over a qcow2, and under one, in a
// window; the string that opens it here does so in QEMU.
func TestLUKSStackIsQEMUs(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	want := noise(3 << 20)
	s := &secrets{t: t, m: map[string]string{"k": "one", "l": "two"}}

	require.NoError(t, os.WriteFile(at("file"), nil, 0o600))
	format(t, "driver=file,filename="+at("file"), nil, 1, "one", want, "")

	create(t, at("over"), &chain.CreateOptions{Size: 1 << 20}, nil, 0)
	format(t, "driver=qcow2,file.filename="+at("over"), nil, 1, "one", want, "")

	// A qcow2 of QEMU's, inside LUKS.
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", at("plain.qcow2"), "4M")
	inner, err := os.ReadFile(at("plain.qcow2"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(at("under"), nil, 0o600))
	format(t, "driver=file,filename="+at("under"), nil, 1, "one", append(inner, make([]byte, 8<<20-len(inner))...), "")
	under := "driver=qcow2,file.driver=luks,file.key-secret=k,file.file.filename=" + at("under")
	d, err := s.open(under, chain.Options{})
	require.NoError(t, err)
	_, err = d.WriteAt(want, 0)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
	require.NoError(t, d.Close())

	// Two layers.
	require.NoError(t, os.WriteFile(at("twice"), nil, 0o600))
	format(t, "driver=file,filename="+at("twice"), nil, 1, "two", make([]byte, 8<<20), "")
	below := "driver=luks,key-secret=l,file.filename=" + at("twice")
	format(t, below, &chain.Options{Secret: s.get}, 1, "one", want, "")
	s.given = nil

	for _, opts := range []string{
		"driver=luks,key-secret=k,file.filename=" + at("file"),
		"driver=luks,key-secret=k,file.driver=qcow2,file.file.filename=" + at("over"),
		under,
		"driver=luks,key-secret=k,file.driver=luks,file.key-secret=l,file.file.filename=" + at("twice"),
		"driver=raw,offset=1M,size=1M,file.driver=luks,file.key-secret=k,file.file.driver=file,file.file.filename=" + at("file"),
	} {
		qemu(t, "qemu-img", "convert", "--object", "secret,id=k,data=one", "--object", "secret,id=l,data=two",
			"--image-opts", opts, "-O", "raw", at("out"))
		theirs, err := os.ReadFile(at("out"))
		require.NoError(t, err)
		for _, ro := range []bool{false, true} {
			d, err := s.open(opts, chain.Options{ReadOnly: ro})
			require.NoError(t, err, opts)
			require.True(t, bytes.Equal(theirs, content(t, d)), opts)
		}
		require.Contains(t, string(theirs), string(want[1<<20:2<<20]))
	}
	require.Contains(t, s.asked, "l")

	d, err = (&secrets{t: t, m: map[string]string{"": "one"}}).open(at("file"), chain.Options{Format: chain.LUKS})
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, content(t, d)))
}

// TestDetachedHeader: one header serves two payloads, each in an image of its
// own kind, at once. QEMU 7.2 knows no detached headers.
func TestDetachedHeader(t *testing.T) {
	for _, version := range []int{1, 2} {
		dir := t.TempDir()
		at := func(name string) string { return filepath.Join(dir, name) }
		want := noise(1 << 20)
		create(t, at("a"), &chain.CreateOptions{Size: 1 << 20}, nil, 0)
		format(t, "driver=qcow2,file.filename="+at("a"), nil, version, "one", want, at("head"))
		create(t, at("b"), &chain.CreateOptions{Format: chain.Raw, Size: 2 << 20}, nil, 0)

		s := &secrets{t: t, m: map[string]string{"": "one"}}
		a, err := s.open("driver=luks,file.driver=qcow2,file.file.filename="+at("a")+",header.filename="+at("head"), chain.Options{})
		require.NoError(t, err)
		b, err := s.open("driver=luks,file.filename="+at("b")+",header.driver=file,header.filename="+at("head"), chain.Options{})
		require.NoError(t, err)
		_, err = b.WriteAt(want, 1<<20)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, content(t, a)))
		require.True(t, bytes.Equal(want, content(t, b)[1<<20:]))

		// Without its header it isn't LUKS.
		for _, file := range []string{"file.driver=qcow2,file.file.filename=" + at("a"), "file.filename=" + at("b")} {
			_, err = s.open("driver=luks,"+file, chain.Options{})
			require.ErrorIs(t, err, image.ErrFormat)
		}
		_, err = s.open("driver=luks,file.filename="+at("head"), chain.Options{})
		require.ErrorIs(t, err, image.ErrUnsupported)
		require.ErrorContains(t, err, "detached")
		_, err = s.open("driver=luks,file.filename="+at("b")+",header.filename="+at("none"), chain.Options{})
		require.ErrorIs(t, err, os.ErrNotExist)
	}
}

// TestLUKSErrors: no failure writes anything or keeps a lock.
func TestLUKSErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "i")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	format(t, "driver=file,filename="+path, nil, 2, "one", make([]byte, 1<<20), "")
	before := sum(t, path)
	loc := "driver=luks,file.filename=" + path
	refused := errors.New("refused")
	for _, c := range []struct {
		location, format string
		secret           func(string) ([]byte, error)
		kind             error
		text             string
	}{
		{loc, "", nil, chain.ErrSecret, path + ": "},
		{path, chain.LUKS, nil, chain.ErrSecret, path + ": "},
		{loc + ",key-secret=k", "", nil, chain.ErrSecret, `key-secret "k"`},
		{loc + ",key-secret=", "", nil, chain.ErrLocation, "key-secret"},
		{loc + ",secret=one", "", nil, chain.ErrLocation, "location.secret"},
		{loc + ",header.size=5,header.filename=x", "", nil, chain.ErrLocation, "header.size"},
		{"driver=luks,key-secret=k", "", nil, chain.ErrLocation, "filename"},
		{loc, "", func(string) ([]byte, error) { return nil, nil }, chain.ErrSecret, ""},
		{loc, "", func(string) ([]byte, error) { return nil, refused }, refused, path},
		{loc, "", func(string) ([]byte, error) { return []byte("wrong"), nil }, luks.ErrPassphrase, path},
		{"driver=luks,file.driver=raw,file.offset=512,file.file.filename=" + path, "",
			func(string) ([]byte, error) { return []byte("one"), nil }, image.ErrFormat, "magic"},
		{"driver=luks" + deep(9), "", nil, chain.ErrLocation, "nodes"},
		{path, "", nil, image.ErrFormat, "-f"},
	} {
		d, err := chain.Open(c.location, &chain.Options{Format: c.format, Secret: c.secret})
		require.ErrorIs(t, err, c.kind, c.location)
		require.ErrorContains(t, err, c.text)
		require.Nil(t, d)
	}
	require.Equal(t, before, sum(t, path))
	d, err := chain.Open(path, &chain.Options{Format: chain.Raw})
	require.NoError(t, err)
	require.NoError(t, d.Close())

	_, err = chain.Open(loc, &chain.Options{Budget: &luks.Budget{Rounds: 10},
		Secret: func(string) ([]byte, error) { return []byte("one"), nil }})
	require.ErrorIs(t, err, luks.ErrBudget)
}

// deep is n luks layers above each other.
func deep(n int) string {
	s := ""
	for i := 1; i <= n; i++ {
		s += "," + strings.Repeat("file.", i) + "driver=luks"
	}
	return s
}
