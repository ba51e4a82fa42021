package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate/swtpm"
)

const index tpm2.TPMHandle = 0x1500016

// TestKills: nvtpm is killed at any moment while a client writes; what was
// answered is there, and at most one write more.
func TestKills(t *testing.T) {
	rounds := imagetest.Scale(12)
	seed := imagetest.Seed(t)
	rng := mrand.New(mrand.NewPCG(seed, 1))
	store := newStore(t, true)
	p, c := open(t, store)
	nvDefine(t, c, index, 8)
	pub := nvPublic(t, c, index)
	require.NoError(t, nvWrite(c, pub, index, 0, make([]byte, 8)))
	p.kill()
	answered, writes := uint64(0), 0
	for round := range rounds {
		p, c := open(t, store, "--flags", "startup-clear")
		got := binary.BigEndian.Uint64(nvRead(t, c, index, 8))
		require.True(t, got == answered || got == answered+1, "round %d: %d was answered, and %d is there", round, answered, got)
		answered = got
		pub := nvPublic(t, c, index)
		die := time.AfterFunc(time.Duration(rng.IntN(60))*time.Millisecond, func() { p.cmd.Process.Kill() })
		for {
			b := binary.BigEndian.AppendUint64(nil, answered+1)
			if nvWrite(c, pub, index, 0, b) != nil {
				break
			}
			answered++
			writes++
		}
		die.Stop()
		p.kill()
	}
	t.Logf("%d kills among %d writes that were answered: none was lost", rounds, writes)
	require.NotZero(t, writes)
}

// TestOneAtATime: a second nvtpm on a store is refused, and so is a second on
// swtpm's files; swtpm itself starts a second on a file, and one's writes are
// lost.
func TestOneAtATime(t *testing.T) {
	store := newStore(t, false)
	dir := t.TempDir()
	for _, place := range [][]string{store, {"--tpmstate", "dir=" + dir}, {"--tpmstate", "backend-uri=file://" + dir + "/lin"}} {
		p, _ := open(t, place)
		second := start(t, "", append([]string{"--tpm2", "--server", "type=unixio,path=DIR/data"}, place...)...)
		require.Equal(t, 13, second.code(), "%s", &second.out)
		require.Contains(t, second.out.String(), "hint:")
		p.stop()
	}
}

func TestKeyOfTheStore(t *testing.T) {
	store := newStore(t, true)
	p, _ := open(t, store)
	p.stop()
	wrong := filepath.Join(t.TempDir(), "wrong")
	require.NoError(t, os.WriteFile(wrong, bytes.Repeat([]byte{1}, 32), 0o600))
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"--store", store[1]}, 11},
		{[]string{"--store", store[1], "--key-file", wrong}, 11},
		{[]string{"--store", store[1], "--key-file", wrong + "x"}, 10},
		{[]string{"--store", store[1] + "x", "--key-file", store[3]}, 10},
		{append(newStore(t, false), "--key-file", store[3]), 25},
		{append([]string{"--key", "file=" + wrong}, store...), 2},
	} {
		before, err := os.ReadFile(store[1])
		require.NoError(t, err)
		p := start(t, "", append([]string{"--tpm2", "--server", "type=unixio,path=DIR/data"}, c.args...)...)
		require.Equal(t, c.code, p.code(), "%v: %s", c.args, &p.out)
		after, err := os.ReadFile(store[1])
		require.NoError(t, err)
		require.Equal(t, before, after)
	}
}

// TestDamage: no damage of the state leads to a new TPM.
func TestDamage(t *testing.T) {
	store := newStore(t, false)
	p, c := open(t, store)
	nvDefine(t, c, index, 8)
	p.stop()
	s, err := nvstore.Open(store[1], nil)
	require.NoError(t, err)
	state, err := s.Get(nvstore.TPMPermanent)
	require.NoError(t, err)
	put := func(p []byte, meta *nvstore.Meta) {
		require.NoError(t, s.Put(nvstore.TPMPermanent, p, meta))
	}
	for name, damage := range map[string]func(){
		"cut":                  func() { put(state[:len(state)/2], nil) },
		"zeros behind":         func() { put(append(bytes.Clone(state[:700]), make([]byte, 2000)...), nil) },
		"empty":                func() { put(nil, nil) },
		"too large":            func() { put(make([]byte, 1<<20), nil) },
		"not a state":          func() { put([]byte("hello"), nil) },
		"state of another TPM": func() { put(state, &nvstore.Meta{Type: "tpm12-permanent"}) },
	} {
		damage()
		require.NoError(t, s.Close())
		before, err := os.ReadFile(store[1])
		require.NoError(t, err)
		p := start(t, "", append([]string{"--tpm2", "--server", "type=unixio,path=DIR/data", "--flags", "startup-clear"}, store...)...)
		require.NotZero(t, p.code(), name)
		require.Contains(t, p.out.String(), "error:", name)
		after, err := os.ReadFile(store[1])
		require.NoError(t, err)
		require.Equal(t, before, after, "%s: the store was written", name)
		s, err = nvstore.Open(store[1], nil)
		require.NoError(t, err)
	}
	put(state, &nvstore.Meta{})
	require.NoError(t, s.Close())
	p, c = open(t, store)
	nvPublic(t, c, index)
	p.stop()
}

// TestFullDisk: a write that finds no room fails, the TPM says so from then
// on, and nothing that was there is lost.
func TestFullDisk(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.raw")
	require.NoError(t, os.WriteFile(image, make([]byte, 256<<10), 0o600))
	opts := "driver=raw,offset=0,size=256k,file.driver=file,file.filename=" + image
	s, err := nvstore.Create(opts, &nvstore.CreateOptions{Existing: true, Size: 256 << 10})
	require.NoError(t, err)
	require.NoError(t, s.Put("uefi/vars", make([]byte, 64<<10), nil))
	require.NoError(t, s.Close())
	args := []string{"--image-opts", opts}
	p, c := open(t, args)
	written := 0
	for i := range tpm2.TPMHandle(60) {
		_, err = tpm2.NVDefineSpace{
			AuthHandle: tpm2.TPMRHOwner,
			PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: index + i, NameAlg: tpm2.TPMAlgSHA256, DataSize: 2048,
				Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}),
		}.Execute(c)
		if err != nil {
			break
		}
		b := make([]byte, 1024)
		rand.Read(b)
		if err = nvWrite(c, nvPublic(t, c, index+i), index+i, 0, b); err != nil {
			break
		}
		written++
	}
	require.ErrorIs(t, err, tpm2.TPMRCFailure)
	waitLog(t, p, "can't be stored")
	_, err = tpm2.GetRandom{BytesRequested: 8}.Execute(c)
	require.ErrorIs(t, err, tpm2.TPMRCFailure)
	p.kill()
	t.Logf("%d indices of 2 KiB fitted", written)
	require.Greater(t, written, 5)
	p, c = open(t, args)
	for i := range tpm2.TPMHandle(written) {
		require.Len(t, nvRead(t, c, index+i, 1024), 1024)
	}
	p.kill()
}

// TestSwtpmFiles: nvtpm goes on where swtpm stopped, in its folder and in its
// file, and swtpm where nvtpm did.
func TestSwtpmFiles(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(key, []byte("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"), 0o600))
	for name, place := range map[string]string{"dir": "dir=%s", "file": "backend-uri=file://%s/lin"} {
		t.Run(name, func(t *testing.T) {
			args := []string{"--tpm2", "--tpmstate", fmt.Sprintf(place, t.TempDir()), "--key", "file=" + key + ",mode=aes-256-cbc",
				"--server", "type=unixio,path=DIR/data", "--ctrl", "type=unixio,path=DIR/ctrl", "--flags", "not-need-init,startup-clear"}
			want := uint64(0)
			for i, program := range []string{"swtpm", "", "swtpm", ""} {
				p := start(t, program, args...)
				c := &tpm{t, p.dial("data")}
				if i == 0 {
					nvDefine(t, c, index, 8)
				} else {
					require.Equal(t, want, binary.BigEndian.Uint64(nvRead(t, c, index, 8)))
				}
				want++
				require.NoError(t, nvWrite(c, nvPublic(t, c, index), index, 0, binary.BigEndian.AppendUint64(nil, want)))
				c.conn.Close()
				out, err := exec.Command("swtpm_ioctl", "-s", "--unix", p.dir+"/ctrl").CombinedOutput()
				require.NoError(t, err, "%s%s", out, &p.out)
				require.Zero(t, p.code())
			}
		})
	}
}

// TestMigrationKeys: a running TPM's state goes from swtpm to nvtpm and back,
// volatile state and all, in clear and under a migration key; a sealed store
// neither gives nor takes it in clear unless told to.
func TestMigrationKeys(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(key, []byte("000102030405060708090a0b0c0d0e0f"), 0o600))
	mkey := []string{"--migration-key", "file=" + key}
	channels := []string{"--tpm2", "--server", "type=unixio,path=DIR/data", "--ctrl", "type=unixio,path=DIR/ctrl"}
	ioctl := func(p *process, args ...string) error {
		out, err := exec.Command("swtpm_ioctl", append([]string{"--unix", p.dir + "/ctrl"}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
		return nil
	}
	kinds := []string{"permanent", "volatile"}
	save := func(p *process) ([]string, error) {
		var files []string
		for _, k := range kinds {
			files = append(files, filepath.Join(t.TempDir(), k))
			if err := ioctl(p, "--save", k, files[len(files)-1]); err != nil {
				return nil, err
			}
		}
		return files, nil
	}
	load := func(p *process, files []string) error {
		p.dial("ctrl").Close()
		for i, k := range kinds {
			if err := ioctl(p, "--load", k, files[i]); err != nil {
				return err
			}
		}
		return ioctl(p, "-i")
	}
	swtpmOn := func(more ...string) *process {
		return start(t, "swtpm", append(append(channels, "--tpmstate", "dir="+t.TempDir()), more...)...)
	}
	nvtpmOn := func(store []string, more ...string) *process {
		return start(t, "", append(append(append([]string{}, channels...), store...), more...)...)
	}
	pcr := func(p *process) string {
		c := &tpm{t, p.dial("data")}
		defer c.conn.Close()
		return pcr(t, c, 7)
	}

	first := swtpmOn("--flags", "not-need-init,startup-clear")
	c := &tpm{t, first.dial("data")}
	extend(t, c, 7)
	nvDefine(t, c, index, 8)
	c.conn.Close()
	want := pcr(first)
	require.NotEqual(t, zeroPCR, want)
	plain, err := save(first)
	require.NoError(t, err)

	sealed := newStore(t, true)
	p := nvtpmOn(sealed)
	require.Error(t, load(p, plain), "a sealed store took a state in clear")
	waitLog(t, p, "allow-plain")
	p.stop()
	p = nvtpmOn(sealed, "--migration", "allow-plain")
	require.NoError(t, load(p, plain))
	require.Equal(t, want, pcr(p))
	back, err := save(p)
	require.NoError(t, err)
	p.stop()
	// A store that is sealed wraps what it hands out in a key of its own, so
	// that it comes back to that store only.
	p = nvtpmOn(sealed)
	require.NoError(t, p2start(p, ioctl))
	own, err := save(p)
	require.NoError(t, err)
	p.stop()
	b, err := os.ReadFile(own[0])
	require.NoError(t, err)
	blob, err := swtpm.Parse(b)
	require.NoError(t, err)
	require.True(t, blob.Encrypted())
	other := swtpmOn()
	require.Error(t, load(other, own))
	other.kill()

	// On to swtpm, in clear and under a key.
	other = swtpmOn()
	require.NoError(t, load(other, back), "%s", &other.out)
	require.Equal(t, want, pcr(other))
	other.kill()
	p = nvtpmOn(newStore(t, true), append(mkey, "--migration", "allow-plain")...)
	require.NoError(t, load(p, plain), "a state in clear is taken although there is a key")
	wrapped, err := save(p)
	require.NoError(t, err)
	p.stop()
	other = swtpmOn(mkey...)
	require.NoError(t, load(other, wrapped), "%s", &other.out)
	require.Equal(t, want, pcr(other))
	wrapped, err = save(other)
	require.NoError(t, err)
	other.kill()
	last := newStore(t, true)
	p = nvtpmOn(last, mkey...)
	require.NoError(t, load(p, wrapped), "%s", &p.out)
	require.Equal(t, want, pcr(p))
	p.stop()
	p, c = open(t, last)
	nvPublic(t, c, index)
	p.stop()
	p = nvtpmOn(newStore(t, true))
	require.Error(t, load(p, wrapped), "without the key")
	p.stop()
}

// p2start initializes a TPM and starts it up.
func p2start(p *process, ioctl func(*process, ...string) error) error {
	p.dial("ctrl").Close()
	if err := ioctl(p, "-i"); err != nil {
		return err
	}
	c := &tpm{p.t, p.dial("data")}
	defer c.conn.Close()
	_, err := tpm2.Startup{StartupType: tpm2.TPMSUClear}.Execute(c)
	return err
}

// TestHostileData: what is no command ends the connection, and the TPM goes
// on.
func TestHostileData(t *testing.T) {
	p, c := open(t, newStore(t, false))
	for _, b := range [][]byte{
		make([]byte, 10),
		[]byte("\x80\x01\xff\xff\xff\xff\x00\x00\x01\x7b"),
		[]byte("\x80\x01\x00\x00\x00\x09\x00\x00\x01\x7b"),
		[]byte("\x00\x00\x00\x08\x00\xff\xff\xff\xff\x80"),
		[]byte("\x80\x01\x00\x00"),
	} {
		c.conn.Close()
		conn := p.dial("data")
		_, err := conn.Write(b)
		require.NoError(t, err)
		if len(b) >= headerLen {
			_, err = conn.Read(make([]byte, 1))
			require.Error(t, err)
		}
		conn.Close()
		c = &tpm{t, p.dial("data")}
		_, err = tpm2.GetRandom{BytesRequested: 8}.Execute(c)
		require.NoError(t, err)
	}
	p.stop()
}

// TestSwtpmFlips prints how many changed bytes of a state in clear swtpm's TPM
// notices, beside nvtpm's on the same bytes in a store.
func TestSwtpmFlips(t *testing.T) {
	good, err := os.ReadFile("../../fixtures/tpm/tpm2-00.permall")
	require.NoError(t, err)
	n := imagetest.Scale(40)
	silent := 0
	for i := range n {
		bad := bytes.Clone(good)
		bad[16+(len(good)-16)*i/n] ^= 1
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "tpm2-00.permall"), bad, 0o600))
		p := start(t, "swtpm", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path=DIR/data",
			"--ctrl", "type=unixio,path=DIR/ctrl", "--flags", "not-need-init,startup-clear")
		if answers(p) {
			silent++
		}
		p.kill()
	}
	store := newStore(t, false)
	s, err := nvstore.Open(store[1], nil)
	require.NoError(t, err)
	require.NoError(t, s.Put(nvstore.TPMPermanent, good[16:], nil))
	require.NoError(t, s.Close())
	image, err := os.ReadFile(store[1])
	require.NoError(t, err)
	first := bytes.Index(image, good[16:16+4096])
	require.Positive(t, first)
	started := 0
	for i := range n {
		bad := bytes.Clone(image)
		bad[first+(len(good)-16)*i/n] ^= 1
		require.NoError(t, os.WriteFile(store[1], bad, 0o600))
		p := start(t, "", append([]string{"--tpm2", "--server", "type=unixio,path=DIR/data", "--flags", "startup-clear"}, store...)...)
		if answers(p) {
			started++
		}
		p.kill()
	}
	t.Logf("of %d changed bytes, swtpm starts on %d (%d %%), nvtpm on %d", n, silent, 100*silent/n, started)
	require.Zero(t, started)
	require.NotZero(t, silent)
}

// answers tells whether the TPM runs, rather than having given up.
func answers(p *process) bool {
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		select {
		case <-p.done:
			return false
		case <-time.After(2 * time.Millisecond):
		}
		conn, err := net.Dial("unix", filepath.Join(p.dir, "data"))
		if err != nil {
			continue
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = tpm2.GetRandom{BytesRequested: 8}.Execute(&tpm{p.t, conn})
		return err == nil
	}
	return false
}

// TestDaemon: --daemon returns when everything is open, and with the daemon's
// exit code when it isn't; sockets are their owner's, and are gone at the end
// like the pid file.
func TestDaemon(t *testing.T) {
	store := newStore(t, true)
	args := append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/ctrl", "--server", "type=unixio,path=DIR/data",
		"--flags", "startup-clear", "--daemon", "--pid", "file=DIR/pid", "--log", "file=DIR/log"}, store...)
	p := start(t, "", args...)
	require.Zero(t, p.code(), "%s", &p.out)
	for _, name := range []string{"ctrl", "data"} {
		info, err := os.Stat(filepath.Join(p.dir, name))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	}
	c := &tpm{t, p.dial("data")}
	_, err := tpm2.GetRandom{BytesRequested: 8}.Execute(c)
	require.NoError(t, err)
	c.conn.Close()
	second := start(t, "", args...)
	require.Equal(t, 13, second.code(), "%s", &second.out)
	out, err := exec.Command("swtpm_ioctl", "-s", "--unix", p.dir+"/ctrl").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Eventually(t, func() bool {
		list, err := os.ReadDir(p.dir)
		return err == nil && len(list) == 1 && list[0].Name() == "log"
	}, waitLong, waitShort)
}
