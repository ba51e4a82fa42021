package chain_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/convert"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/qcow2"
)

const qemuSecret = "secret,id=k,data=one"

// qemuMeasuring is qemu, again where QEMU finds its clock too coarse to
// measure its own speed by.
func qemuMeasuring(t *testing.T, args ...string) {
	t.Helper()
	for range 50 {
		out, err := exec.Command("qemu-img", args...).CombinedOutput()
		if err == nil {
			return
		}
		require.Contains(t, string(out), "accurate CPU usage")
	}
	t.Fatal("QEMU can't measure its speed here")
}

func encryptedOpts(path, format string) string {
	return "driver=qcow2,encrypt.format=" + format + ",encrypt.key-secret=k,file.driver=file,file.filename=" + path
}

func one() *luks.FormatOptions {
	return &luks.FormatOptions{Passphrase: []byte("one"), Iterations: 1000}
}

// qcow2s are encrypted images that QEMU or this package made.
func qcow2s(t *testing.T, size int64) map[string]string {
	t.Helper()
	dir := t.TempDir()
	all := map[string]string{}
	for name, o := range map[string]chain.CreateOptions{
		"ours": {}, "ours-small": {ClusterSize: 4096},
		"ours-version-2":   {QCOW2: &qcow2.CreateOptions{Version: 2}},
		"ours-subclusters": {QCOW2: &qcow2.CreateOptions{ExtendedL2: true}},
	} {
		o.Size, o.LUKS = size, one()
		if strings.Contains(name, "small") {
			o.LUKS.Encryption, o.LUKS.Hash = "twofish-cbc-essiv:sha256", "sha1"
		}
		all[name] = filepath.Join(dir, name)
		create(t, all[name], &o, nil, 0)
	}
	all["QEMU's"] = filepath.Join(dir, "theirs")
	qemuMeasuring(t, "create", "-q", "--object", qemuSecret, "-f", "qcow2", "-o",
		"encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10,cluster_size=8k", all["QEMU's"], fmt.Sprint(size))
	return all
}

// TestEncryptedQCOW2: QEMU and this package write to an encrypted image in turn,
// with snapshots and reverts between, so that clusters move; both read the same.
func TestEncryptedQCOW2(t *testing.T) {
	const size = 2 << 20
	seed := imagetest.Seed(t)
	for name, path := range qcow2s(t, size) {
		t.Run(name, func(t *testing.T) {
			s := &secrets{t: t, m: map[string]string{"k": "one"}}
			rng := rand.New(rand.NewPCG(seed, uint64(len(name))))
			opts := encryptedOpts(path, "luks")
			model := make([]byte, size)
			saved := map[string][]byte{}
			io := func(writes ...string) {
				args := []string{"--object", qemuSecret, "--image-opts", opts}
				for _, w := range writes {
					args = append(args, "-c", w)
				}
				qemu(t, "qemu-io", args...)
			}
			for round := range imagetest.Scale(3) {
				d, err := s.open(opts, chain.Options{})
				require.NoError(t, err)
				for range 12 {
					off := rng.Int64N(size)
					p := noise(int(rng.Int64N(min(size-off, 200_000)) + 1))
					p[0] ^= byte(round)
					_, err := d.WriteAt(p, off)
					require.NoError(t, err)
					copy(model[off:], p)
				}
				sn, ok := image.As[image.Snapshotter](d)
				require.True(t, ok)
				tag := fmt.Sprint("s", round)
				if round%2 == 0 {
					require.NoError(t, sn.Snapshots().Create(tag))
					saved[tag] = bytes.Clone(model)
				}
				require.NoError(t, d.Sync())
				require.NoError(t, d.Close())
				if round%2 == 1 {
					qemu(t, "qemu-img", "snapshot", "--object", qemuSecret, "-c", tag, "--image-opts", opts)
					saved[tag] = bytes.Clone(model)
				}
				var writes []string
				for range 8 {
					off, n, b := rng.Int64N(size/512)*512, rng.Int64N(64)*512+512, byte(rng.IntN(255)+1)
					n = min(n, size-off)
					writes = append(writes, fmt.Sprintf("write -P %d %d %d", b, off, n))
					copy(model[off:], bytes.Repeat([]byte{b}, int(n)))
				}
				io(writes...)
				d, err = s.open(opts, chain.Options{ReadOnly: true})
				require.NoError(t, err)
				require.True(t, bytes.Equal(model, content(t, d)), "round %d", round)
				out := path + ".raw"
				qemu(t, "qemu-img", "convert", "--object", qemuSecret, "--image-opts", opts, "-O", "raw", out)
				theirs, err := os.ReadFile(out)
				require.NoError(t, err)
				require.True(t, bytes.Equal(model, theirs), "round %d", round)
			}
			for tag, want := range saved {
				d, err := s.open(opts, chain.Options{})
				require.NoError(t, err)
				sn, _ := image.As[image.Snapshotter](d)
				require.NoError(t, sn.Snapshots().Revert(tag))
				require.True(t, bytes.Equal(want, content(t, d)), tag)
				qemu(t, "qemu-io", "-r", "--object", qemuSecret, "--image-opts", opts, "-c", fmt.Sprintf("read 0 %d", size))
			}
			qemu(t, "qemu-img", "check", "--object", qemuSecret, "--image-opts", opts)
			// No plaintext: the model's bytes repeat, and are in no cluster.
			raw, err := os.ReadFile(path)
			require.NoError(t, err)
			require.False(t, bytes.Contains(raw, noise(1024)[256:512]))
		})
	}
}

// TestLegacyAES reads what QEMU encrypted the old way, by the guest's sectors.
func TestLegacyAES(t *testing.T) {
	path := filepath.Join(t.TempDir(), "i")
	want := noise(1 << 20)
	require.NoError(t, os.WriteFile(path+".raw", want, 0o600))
	opts := encryptedOpts(path, "aes")
	qemu(t, "qemu-img", "create", "-q", "--object", qemuSecret, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=k", path, "1M")
	qemu(t, "qemu-img", "convert", "--object", qemuSecret, "-n", "-f", "raw", path+".raw", "--target-image-opts", opts)
	before := sum(t, path)
	s := &secrets{t: t, m: map[string]string{"k": "one"}}
	allow := func(file string) error { require.Equal(t, path, file); return nil }
	for _, o := range []chain.Options{{}, {ReadOnly: true}, {LegacyAES: allow}} {
		_, err := s.open(opts, o)
		require.ErrorIs(t, err, image.ErrUnsupported)
		require.ErrorContains(t, err, "convert")
	}
	d, err := s.open(opts, chain.Options{ReadOnly: true, LegacyAES: allow})
	require.NoError(t, err)
	_, err = d.WriteAt(want[:512], 0)
	require.ErrorIs(t, err, image.ErrReadOnly)
	require.True(t, bytes.Equal(want, content(t, d)))
	s.m[""] = "one"
	d, err = s.open(path, chain.Options{Format: chain.QCOW2, ReadOnly: true, LegacyAES: allow})
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, content(t, d)))
	// Nobody can tell that a passphrase is wrong.
	s.m["k"] = "two"
	d, err = s.open(opts, chain.Options{ReadOnly: true, LegacyAES: allow})
	require.NoError(t, err)
	require.False(t, bytes.Equal(want, content(t, d)))
	require.Equal(t, before, sum(t, path))
}

// TestEncryptionIsToldApart: a location that says one thing and an image that is
// another never open, and what opens without its key is no state at all.
func TestEncryptionIsToldApart(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, at("luks"), &chain.CreateOptions{Size: 1 << 20, LUKS: one()}, nil, 0)
	create(t, at("plain"), &chain.CreateOptions{Size: 1 << 20}, nil, 0)
	qemu(t, "qemu-img", "create", "-q", "--object", qemuSecret, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=k", at("aes"), "1M")
	patch := func(name string, typ uint32) {
		p, err := os.ReadFile(at("luks"))
		require.NoError(t, err)
		i := bytes.Index(p[:4096], []byte{0x05, 0x37, 0xbe, 0x77})
		require.Positive(t, i)
		binary.BigEndian.PutUint32(p[i:], typ)
		require.NoError(t, os.WriteFile(at(name), p, 0o600))
	}
	patch("draft", 0x4c554b53)
	patch("none", 0x12345678)
	stack := func(name, more string) string { return "driver=qcow2,file.filename=" + at(name) + more }
	const k = ",encrypt.key-secret=k"
	for _, c := range []struct {
		location, pass string
		kind           error
		text           string
	}{
		{stack("luks", ""), "one", chain.ErrLocation, "encrypt.format"},
		{stack("luks", ",encrypt.format=aes"+k), "one", chain.ErrLocation, "crypt_method"},
		{stack("luks", ",encrypt.format=luks"+k), "", chain.ErrSecret, `key-secret "k"`},
		{stack("luks", ",encrypt.format=luks"+k), "two", luks.ErrPassphrase, at("luks")},
		{stack("luks", ",encrypt.format=vigenere"+k), "one", chain.ErrLocation, "luks or aes"},
		{stack("luks", k), "one", chain.ErrLocation, "encrypt.format"},
		{stack("plain", ",encrypt.format=luks"+k), "one", chain.ErrPlain, "crypt_method"},
		{stack("aes", ",encrypt.format=luks"+k), "one", chain.ErrLocation, "crypt_method"},
		{stack("aes", ",encrypt.format=aes"+k), "one", image.ErrUnsupported, "legacy"},
		{stack("draft", ",encrypt.format=luks"+k), "one", image.ErrUnsupported, "0x4c554b53"},
		{stack("none", ",encrypt.format=luks"+k), "one", image.ErrCorrupt, ""},
		{"driver=luks,key-secret=k,file.filename=" + at("luks"), "one", image.ErrFormat, ""},
		{"driver=luks,key-secret=k,file.driver=qcow2,file.file.filename=" + at("luks"), "one", chain.ErrLocation, "encrypt.format"},
		{"driver=luks,file.driver=qcow2,file.encrypt.format=luks,file.file.filename=" + at("luks"), "one", chain.ErrLocation, "key-secret"},
	} {
		name := strings.NewReplacer("driver=qcow2,file.filename="+dir+"/", "").Replace(c.location)
		s := &secrets{t: t, m: map[string]string{"k": c.pass, "": c.pass}}
		for _, ro := range []bool{true, false} {
			d, err := s.open(c.location, chain.Options{ReadOnly: ro})
			require.ErrorIs(t, err, c.kind, name)
			require.ErrorContains(t, err, c.text, name)
			require.Nil(t, d)
		}
	}
	for _, name := range []string{"luks", "draft", "none", "aes"} {
		_, err := chain.Open(at(name), &chain.Options{Format: chain.QCOW2})
		require.Error(t, err, name)
		_, err = chain.Open(at(name), nil)
		require.Error(t, err, name)
	}
}

// TestInspect tells images apart without a key.
func TestInspect(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, at("luks-in-qcow2"), &chain.CreateOptions{Size: 1 << 20, LUKS: one()}, nil, 0)
	create(t, at("plain"), &chain.CreateOptions{Size: 1 << 20}, nil, 0)
	for version, name := range []string{1: "luks1", 2: "luks2"} {
		if version > 0 {
			f := one()
			f.Version, f.PBKDF2 = version, true
			create(t, at(name), &chain.CreateOptions{Format: chain.LUKS, Size: 1 << 20, LUKS: f}, nil, 0)
		}
	}
	qemu(t, "qemu-img", "create", "-q", "--object", qemuSecret, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=k", at("aes"), "1M")
	file := func(name string, change func(p []byte)) {
		p, err := os.ReadFile(at(name))
		require.NoError(t, err)
		change(p)
		require.NoError(t, os.WriteFile(at("changed"), p, 0o600))
	}
	for _, c := range []struct {
		name, format, encryption, note string
		damaged                        error
		change                         func(p []byte)
	}{
		{"luks1", chain.LUKS, "luks1", "without the key", nil, nil},
		{"luks2", chain.LUKS, "luks2", "QEMU knows no LUKS2", nil, nil},
		{"luks2", chain.LUKS, "luks2", "", nil, func(p []byte) { clear(p[:4096]) }},
		{"luks-in-qcow2", chain.QCOW2, "luks1", "claim", nil, nil},
		{"plain", chain.QCOW2, "none", "LUKS layer above", nil, nil},
		{"aes", chain.QCOW2, "aes", "no key derivation", nil, nil},
		{"luks-in-qcow2", chain.QCOW2, "luks-draft", "2016", nil, func(p []byte) {
			binary.BigEndian.PutUint32(p[bytes.Index(p, []byte{5, 0x37, 0xbe, 0x77}):], 0x4c554b53)
		}},
		{"luks-in-qcow2", chain.QCOW2, "luks1", "", image.ErrCorrupt, func(p []byte) {
			binary.BigEndian.PutUint64(p[bytes.Index(p, []byte{5, 0x37, 0xbe, 0x77})+8:], 1<<40)
		}},
		{"luks1", chain.LUKS, "", "", image.ErrCorrupt, func(p []byte) { clear(p[108:112]) }},
		{"luks1", "", "", "detached or destroyed", nil, func(p []byte) { clear(p[:6]) }},
		{"plain", chain.QCOW2, "", "", image.ErrUnsupported, func(p []byte) { p[7] = 9 }},
	} {
		file(c.name, func(p []byte) {
			if c.change != nil {
				c.change(p)
			}
		})
		d, err := chain.Open(at("changed"), &chain.Options{Format: chain.Raw, ReadOnly: true})
		require.NoError(t, err)
		p, err := chain.Inspect(d)
		require.NoError(t, err, "%+v", c)
		require.NoError(t, d.Close())
		require.Equal(t, c.format, p.Format, "%+v", c)
		require.Equal(t, c.encryption, p.Encryption, "%+v", c)
		require.Contains(t, strings.Join(p.Notes, "; "), c.note)
		require.ErrorIs(t, p.Damaged, c.damaged)
		require.Equal(t, c.damaged == nil && strings.HasPrefix(c.encryption, "luks") && c.encryption != "luks-draft", p.LUKS != nil, "%+v", c)
	}
}

// TestOpenHeader changes key slots of each kind of image.
func TestOpenHeader(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, at("q"), &chain.CreateOptions{Size: 1 << 20, LUKS: one()}, nil, 0)
	create(t, at("d"), &chain.CreateOptions{Size: 1 << 20}, nil, 0)
	format(t, "driver=qcow2,file.filename="+at("d"), nil, 2, "one", noise(1<<20), at("h"))
	detached := "driver=luks,key-secret=k,file.driver=qcow2,file.file.filename=" + at("d") + ",header.filename=" + at("h")
	for _, c := range []struct{ location, format, open string }{
		{at("q"), chain.QCOW2, encryptedOpts(at("q"), "luks")},
		{detached, "", detached},
	} {
		h, payload, err := chain.OpenHeader(c.location, &chain.Options{Format: c.format})
		require.NoError(t, err)
		require.Equal(t, c.format == "", payload != nil)
		_, err = luks.ChangeKey(h, &luks.KeyOptions{Passphrase: []byte("one"), NewPassphrase: []byte("two"), PBKDF2: true, Iterations: 1000})
		require.NoError(t, err)
		require.NoError(t, h.Close())
		if payload != nil {
			require.NoError(t, payload.Close())
		}
		s := &secrets{t: t, m: map[string]string{"k": "one"}}
		_, err = s.open(c.open, chain.Options{})
		require.ErrorIs(t, err, luks.ErrPassphrase)
		s.m["k"] = "two"
		d, err := s.open(c.open, chain.Options{})
		require.NoError(t, err)
		require.NoError(t, d.Close())
	}
	qemu(t, "qemu-io", "-r", "--object", "secret,id=k,data=two", "--image-opts", encryptedOpts(at("q"), "luks"), "-c", "read 0 1M")
	for _, c := range []struct {
		location, format string
		kind             error
	}{
		{at("d"), chain.QCOW2, image.ErrUnsupported}, {at("d"), chain.Raw, chain.ErrLocation}, {at("d"), "", chain.ErrLocation},
		{"driver=raw,file.filename=" + at("d"), "", chain.ErrLocation}, {at("none"), chain.LUKS, os.ErrNotExist},
		{detached, chain.LUKS, chain.ErrLocation},
	} {
		_, _, err := chain.OpenHeader(c.location, &chain.Options{Format: c.format})
		require.ErrorIs(t, err, c.kind, c.location)
	}
}

// TestCreateEncrypted: what can't be made leaves nothing behind.
func TestCreateEncrypted(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	for _, o := range []chain.CreateOptions{
		{Format: chain.LUKS}, {Format: chain.Raw, LUKS: one()}, {Format: chain.LUKS, LUKS: &luks.FormatOptions{}},
		{LUKS: &luks.FormatOptions{}}, {LUKS: &luks.FormatOptions{Passphrase: []byte("x"), Version: 2}},
		{LUKS: &luks.FormatOptions{Passphrase: []byte("x"), Encryption: "cipher_null-ecb"}},
	} {
		_, err := chain.Create(path, &o)
		require.Error(t, err, "%+v", o)
		require.Empty(t, names(t, dir))
	}
}

// TestChainsKeepTheirEncryption: whatever is copied, committed or rebased goes
// through each image's own cipher, so that no ciphertext gets into a plain image
// and nothing plain into an encrypted one.
func TestChainsKeepTheirEncryption(t *testing.T) {
	const size = 1 << 20
	mark, other := []byte("what the guest wrote, plainly to be seen."), []byte("and what it wrote before that, elsewhere.")
	for _, kinds := range [][2]bool{{true, false}, {false, true}, {true, true}, {false, false}} {
		dir := t.TempDir()
		base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
		make := func(path string, crypt bool, o *chain.CreateOptions) {
			if o.Size = size; crypt {
				o.LUKS = one()
			}
			create(t, path, o, nil, 0)
		}
		write := func(d image.Device, p []byte, off int64) {
			_, err := d.WriteAt(bytes.Repeat(p, 3000/len(p)), off)
			require.NoError(t, err)
		}
		// plain tells whether a file has text, which must be so for a plain
		// image and not for an encrypted one.
		check := func(path string, crypt bool, text []byte) {
			p, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, !crypt, bytes.Contains(p, text), "%v: %s in %s", kinds, text, filepath.Base(path))
		}
		s := &secrets{t: t, m: map[string]string{"": "one", "backing": "one"}}
		open := func(path string, o chain.Options) image.Device {
			o.Format, o.AllowExternal = chain.QCOW2, true
			d, err := s.open(path, o)
			require.NoError(t, err)
			return d
		}
		make(base, kinds[1], &chain.CreateOptions{})
		d := open(base, chain.Options{})
		write(d, other, 0)
		require.NoError(t, d.Close())
		check(base, kinds[1], other)
		make(top, kinds[0], &chain.CreateOptions{QCOW2: &qcow2.CreateOptions{BackingFile: "base", BackingFormat: "qcow2"}})

		// A write of part of a cluster copies the rest of it up.
		d = open(top, chain.Options{})
		write(d, mark, 10_000)
		want := readAll(t, d)
		require.NoError(t, d.Sync())
		require.NoError(t, d.Close())
		check(top, kinds[0], mark)
		check(top, kinds[0], other)
		if kinds[0] || kinds[1] {
			_, err := (&secrets{t: t}).open(top, chain.Options{Format: chain.QCOW2, AllowExternal: true})
			require.ErrorIs(t, err, chain.ErrSecret)
		}

		// Rebase onto nothing.
		d = open(top, chain.Options{})
		write(d, mark, 300_000)
		require.NoError(t, convert.Rebase(t.Context(), d, nil, nil))
		require.NoError(t, d.Sync())
		copy(want[300_000:], readAll(t, d)[300_000:303_000])
		im, ok := image.As[*qcow2.Image](d)
		require.True(t, ok)
		require.NoError(t, im.ChangeBacking("", "", nil))
		require.NoError(t, d.Close())
		alone := open(top, chain.Options{ReadOnly: true})
		require.True(t, bytes.Equal(want, content(t, alone)))

		// Commit.
		d, b := open(top, chain.Options{}), open(base, chain.Options{})
		require.NoError(t, convert.Commit(t.Context(), d, b, &convert.CommitOptions{Keep: true}))
		require.NoError(t, d.Close())
		require.True(t, bytes.Equal(want, content(t, b)))
		check(base, kinds[1], mark)
	}
}

// TestEncryptedVMState: a machine's state that lies in an encrypted image is
// encrypted there, and outlives what this package does to the image. QEMU 7.2
// itself aborts on savevm into any encrypted qcow2, so qemu-io writes the state.
func TestEncryptedVMState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "i")
	create(t, path, &chain.CreateOptions{Size: 8 << 20, LUKS: one()}, nil, 0)
	opts := encryptedOpts(path, "luks")
	io := func(cmds ...string) {
		args := []string{"--object", qemuSecret, "--image-opts", opts}
		for _, c := range cmds {
			args = append(args, "-c", c)
		}
		qemu(t, "qemu-io", args...)
	}
	io("write -P 3 0 64k", "write -b -P 9 0 128k")
	qemu(t, "qemu-img", "snapshot", "--object", qemuSecret, "-c", "state", "--image-opts", opts)
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	require.False(t, bytes.Contains(p, bytes.Repeat([]byte{9}, 64)))

	s := &secrets{t: t, m: map[string]string{"k": "one"}}
	d, err := s.open(opts, chain.Options{})
	require.NoError(t, err)
	want := noise(2 << 20)
	_, err = d.WriteAt(want, 1<<20)
	require.NoError(t, err)
	sn, ok := image.As[image.Snapshotter](d)
	require.True(t, ok)
	require.NoError(t, sn.Snapshots().Create("ours"))
	_, err = d.WriteAt(want, 0)
	require.NoError(t, err)
	require.NoError(t, sn.Snapshots().Revert("state"))
	require.NoError(t, sn.Snapshots().Revert("ours"))
	require.True(t, bytes.Equal(want, content(t, d)[1<<20:3<<20]))
	qemu(t, "qemu-img", "check", "--object", qemuSecret, "--image-opts", opts)
	qemu(t, "qemu-img", "snapshot", "--object", qemuSecret, "-a", "state", "--image-opts", opts)
	io("read -b -P 9 0 128k", "read -P 3 0 64k")
}
