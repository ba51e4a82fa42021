package nbd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
	"nvstore.dev/image/raw"
)

// run runs a program that must succeed, and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %s\n%s", name, strings.Join(args, " "), out)
	return string(out)
}

// nbdsh runs Python with libnbd's handle h.
func nbdsh(t *testing.T, uri, code string) string {
	t.Helper()
	return run(t, "/usr/bin/python3", "-m", "nbd", "-u", uri, "-c", code)
}

func noise(n int) []byte {
	p := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range p {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		p[i] = byte(x)
	}
	return p
}

// sparse is a file with data at its begin, its end and in the middle.
func sparse(t *testing.T, n int64) *raw.Device {
	t.Helper()
	d, err := raw.Create(filepath.Join(t.TempDir(), "disk"), n, nil)
	require.NoError(t, err)
	t.Cleanup(func() { d.Close() })
	for _, off := range []int64{0, n / 2, n - 70_000} {
		_, err = d.WriteAt(noise(70_000), off)
		require.NoError(t, err)
	}
	return d
}

// nbdinfo reports every feature, and byte-exact sizes.
func TestNbdinfo(t *testing.T) {
	certs := newCA(t)
	for name, c := range map[string]struct {
		opts  *nbd.ServerOptions
		query string
	}{
		"plain": {nil, ""},
		"TLS":   {&nbd.ServerOptions{TLS: certs.server(t, true)}, "&tls-certificates=" + certs.dir},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, c.opts, &nbd.Export{Name: "a/b", Description: "some bytes", Device: sparse(t, 300_001)},
				&nbd.Export{Name: "ro", Device: imagetest.NewMemory(7), ReadOnly: true},
				&nbd.Export{Name: "blocks", Device: imagetest.NewMemory(1 << 20), MinBlock: 4096, MaxPayload: 1 << 20})
			scheme := "nbd+unix"
			if c.opts != nil {
				scheme = "nbds+unix"
			}
			var out struct {
				Protocol   string
				TLS        bool
				Structured bool
				Exports    []map[string]any
			}
			text := run(t, "nbdinfo", "--json", "--list", scheme+":///?socket="+s.sock+c.query)
			require.NoError(t, json.Unmarshal([]byte(text), &out), text)
			require.Equal(t, "newstyle-fixed", out.Protocol)
			require.Equal(t, c.opts != nil, out.TLS)
			require.True(t, out.Structured)
			require.Len(t, out.Exports, 3)
			for i, want := range []map[string]any{
				{"export-name": "a/b", "description": "some bytes", "export-size": 300001.0, "is_read_only": false, "can_cache": true,
					"can_df": true, "can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true, "can_trim": true,
					"can_zero": true, "block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": 33554432.0,
					"contexts": []any{"base:allocation"}},
				{"export-name": "blocks", "export-size": 1048576.0, "block_size_minimum": 4096.0, "block_size_maximum": 1048576.0},
				{"export-name": "ro", "export-size": 7.0, "is_read_only": true, "can_trim": false, "can_zero": false, "can_flush": true},
			} {
				for key, value := range want {
					require.Equal(t, value, out.Exports[i][key], "%s of %s", key, want["export-name"])
				}
			}
			if c.opts == nil {
				require.Contains(t, run(t, "nbdinfo", "--map", s.uri("a/b")), "3  hole,zero")
			}
		})
	}
}

// Programs of others copy through the server, both ways, byte for byte.
func TestCopies(t *testing.T) {
	d := sparse(t, 3<<20)
	target, err := raw.Create(filepath.Join(t.TempDir(), "target"), 3<<20, nil)
	require.NoError(t, err)
	defer target.Close()
	s := serve(t, nil, &nbd.Export{Name: "from", Device: d, ReadOnly: true}, &nbd.Export{Name: "to", Device: target},
		&nbd.Export{Name: "slow", Device: slowly{target}})
	want := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, want, 0))
	for name, args := range map[string][]string{
		"nbdcopy":          {"nbdcopy", s.uri("from"), s.uri("to")},
		"nbdcopy, flush":   {"nbdcopy", "--flush", "--connections=4", "--requests=16", s.uri("from"), s.uri("to")},
		"nbdcopy, slow":    {"nbdcopy", "--flush", s.uri("from"), s.uri("slow")},
		"nbdcopy, no dest": {"nbdcopy", "--destination-is-zero", "--allocated", s.uri("from"), s.uri("to")},
		"qemu-img":         {"qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", s.uri("from"), s.uri("to")},
		"qemu-img, -W":     {"qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", s.uri("from"), s.uri("slow")},
		"qemu-img, -S 0":   {"qemu-img", "convert", "-n", "-S", "0", "-f", "raw", "-O", "raw", s.uri("from"), s.uri("to")},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, target.WriteZeroes(0, target.Size()))
			if name != "nbdcopy, no dest" {
				_, err := target.WriteAt(bytes.Repeat([]byte{0xEE}, 1<<20), 1<<20)
				require.NoError(t, err)
			}
			run(t, args[0], args[1:]...)
			got := make([]byte, len(want))
			require.NoError(t, image.ReadFull(target, got, 0))
			require.True(t, bytes.Equal(want, got))
			require.Contains(t, run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.uri("from"), s.uri("to")), "identical")
		})
	}
	out := run(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uri("from"))
	require.Contains(t, out, `"zero": true`)
	require.Empty(t, s.told())
}

// qemu-io's verify, FUA, zeroes and discards; a qcow2 inside an export.
func TestQEMUIO(t *testing.T) {
	d, err := raw.Create(filepath.Join(t.TempDir(), "disk"), 8<<20, nil)
	require.NoError(t, err)
	defer d.Close()
	s := serve(t, nil, &nbd.Export{Name: "x", Device: d}, &nbd.Export{Name: "blocks", Device: d, MinBlock: 4096})
	for _, export := range []string{"x", "blocks"} {
		run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "-c", "write -f -P 2 1000 3333", "-c", "flush",
			"-c", "write -z 64k 64k", "-c", "write -z -u 256k 64k", "-c", "write -z -u -n 512k 64k", "-c", "discard 768k 64k",
			"-c", "aio_write -P 3 2M 512k", "-c", "aio_write -P 4 3M 512k", "-c", "aio_flush",
			"-c", "read -P 1 0 1000", "-c", "read -P 2 1000 3333", "-c", "read -P 1 4333 5000", "-c", "read -P 0 64k 64k",
			"-c", "read -P 0 256k 64k", "-c", "read -P 0 512k 64k", "-c", "read -P 3 2M 512k", "-c", "read -P 4 3M 512k", s.uri(export))
	}
	run(t, "qemu-img", "create", "-f", "qcow2", s.uri("x"), "4M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", s.uri("x"))
	run(t, "qemu-img", "check", "-f", "qcow2", s.uri("x"))
	run(t, "qemu-img", "snapshot", "-c", "one", s.uri("x"))
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 8 0 1M", s.uri("x"))
	run(t, "qemu-img", "snapshot", "-a", "one", s.uri("x"))
	run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 9 0 1M", s.uri("x"))
	require.Empty(t, s.told())
}

// libnbd's handle: every command and flag, as far as libnbd lets it.
func TestNbdsh(t *testing.T) {
	s := serve(t, nil, &nbd.Export{Name: "x", Device: sparse(t, 1<<20+5)})
	nbdsh(t, s.uri("x"), `
assert h.get_size() == 1048581
h.pwrite(b"abc", 1048578)
h.pwrite(b"x" * 1000, 17, nbd.CMD_FLAG_FUA)
assert h.pread(3, 1048578) == b"abc"
assert h.pread(1000, 17) == b"x" * 1000
h.zero(100, 20, nbd.CMD_FLAG_NO_HOLE)
h.zero(100, 320, nbd.CMD_FLAG_FAST_ZERO)
h.zero(100, 520, nbd.CMD_FLAG_FUA)
h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
h.cache(1000, 5)
h.flush()
assert h.pread(3, 19) == b"x\0\0"
chunks = []
def f(buf, off, status, err): chunks.append((off, len(buf), status)); return 0
h.pread_structured(1048581, 0, f, nbd.CMD_FLAG_DF)
assert chunks == [(0, 1048581, nbd.READ_DATA)], chunks
chunks = []
h.pread_structured(1048581, 0, f)
assert sum(c[1] for c in chunks) == 1048581 and any(c[2] == nbd.READ_HOLE for c in chunks), chunks
try:
    h.set_strict_mode(0)
    h.pread(2, 1048580)
    assert False
except nbd.Error as e:
    assert e.errno == "EINVAL", e
try:
    h.pwrite(b"ab", 1048580)
    assert False
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
cookies = [h.aio_pread(nbd.Buffer(4096), 4096 * i) for i in range(200)]
while h.aio_in_flight() > 0: h.poll(-1)
for c in cookies: assert h.aio_command_completed(c)
h.shutdown()
`)
}

// Linux's other clients: fio with many requests in flight, verified, and
// nbdkit as a client of ours and a server to ours.
func TestFioAndNbdkit(t *testing.T) {
	s := serve(t, nil, &nbd.Export{Name: "x", Device: imagetest.NewMemory(4 << 20)},
		&nbd.Export{Name: "slow", Device: slowly{imagetest.NewMemory(4 << 20)}})
	for _, export := range []string{"x", "slow"} {
		run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+s.uri(export), "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=1",
			"--size=4m", "--iodepth=32", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--fsync=50", "--number_ios=600")
	}
	k := nbdkit(t, "nbd", "uri="+s.uri("x"))
	d := open(t, k.uri(""), nil)
	defer d.Close()
	want := noise(100_001)
	_, err := d.WriteAt(want, 77)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
	again := open(t, s.uri("x"), &nbd.Options{ReadOnly: true})
	defer again.Close()
	got := make([]byte, len(want))
	require.NoError(t, image.ReadFull(again, got, 77))
	require.Equal(t, want, got)
	require.Empty(t, s.told())
}

// The client with servers of every kind and age.
func TestClientOfOthers(t *testing.T) {
	want := noise(200_000)
	use := func(t *testing.T, d *nbd.Device) {
		t.Helper()
		_, err := d.WriteAt(want, 4096)
		require.NoError(t, err)
		require.NoError(t, d.Sync())
		_, err = d.WriteDurable([]byte("durable"), 0)
		require.NoError(t, err)
		require.NoError(t, d.WriteZeroes(10_000, 20_000))
		require.NoError(t, d.Discard(500_000, 100_000))
		require.NoError(t, d.Prefetch(0, 100_000))
		got := make([]byte, len(want))
		require.NoError(t, image.ReadFull(d, got, 4096))
		model := bytes.Clone(want)
		clear(model[10_000-4096 : 30_000-4096])
		require.True(t, bytes.Equal(model, got))
		for off := int64(0); off < d.Size(); {
			e, err := d.BlockStatus(off, d.Size()-off)
			require.NoError(t, err)
			off += e.Length
		}
		require.NoError(t, d.Close())
	}
	for name, args := range map[string][]string{
		"nbdkit":                   {"memory", "1M"},
		"nbdkit, not fixed":        {"--mask-handshake=0", "memory", "1M"},
		"nbdkit, no zeroes":        {"--mask-handshake=1", "memory", "1M"},
		"nbdkit, no structured":    {"--no-sr", "memory", "1M"},
		"nbdkit, no FUA":           {"--filter=fua", "memory", "1M", "fuamode=discard"},
		"nbdkit, FUA forced":       {"--filter=fua", "memory", "1M", "fuamode=force"},
		"nbdkit, small payloads":   {"--filter=blocksize-policy", "memory", "1M", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"},
		"nbdkit, blocks of 64 KiB": {"--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=65536", "blocksize-preferred=65536", "blocksize-maximum=131072", "blocksize-error-policy=error"},
		"nbdkit, slow":             {"--filter=delay", "memory", "1M", "rdelay=2ms", "wdelay=2ms"},
		"nbdkit, one thread":       {"-t", "1", "memory", "1M"},
	} {
		t.Run(name, func(t *testing.T) {
			use(t, open(t, nbdkit(t, args...).uri(""), nil))
		})
	}
	t.Run("qemu-nbd", func(t *testing.T) {
		use(t, open(t, qemuNBD(t, blank(t, 1<<20), "-x", "a name", "-D", "for people").uri("a%20name"), nil))
	})
	t.Run("qemu-storage-daemon", func(t *testing.T) {
		sock := socket(t)
		file := blank(t, 1<<20)
		start(t, sock, "qemu-storage-daemon", "--blockdev", "driver=file,node-name=f,filename="+file,
			"--nbd-server", "addr.type=unix,addr.path="+sock, "--export", "type=nbd,id=e,node-name=f,name=f,writable=on")
		d := open(t, "nbd+unix:///f?socket="+sock, nil)
		info := d.Info()
		require.True(t, info.Flush && info.FUA && info.Trim && info.WriteZeroes && info.Allocation && info.MultiConn && info.FastZero)
		use(t, d)
	})
	t.Run("qemu-nbd, read-only", func(t *testing.T) {
		p := qemuNBD(t, blank(t, 1<<20), "-r")
		_, err := nbd.Open(context.Background(), p.uri(""), nil)
		require.ErrorIs(t, err, image.ErrReadOnly)
		d := open(t, p.uri(""), &nbd.Options{ReadOnly: true})
		require.NoError(t, image.ReadFull(d, make([]byte, 1000), 5))
		require.NoError(t, d.Close())
	})
	t.Run("nbdkit, oldstyle", func(t *testing.T) {
		_, err := nbd.Open(context.Background(), nbdkit(t, "-o", "memory", "1M").uri(""), nil)
		require.ErrorIs(t, err, image.ErrUnsupported)
		require.ErrorContains(t, err, "oldstyle")
	})
}

// TLS with the servers of others, whose certificates are checked.
func TestTLS(t *testing.T) {
	certs := newCA(t)
	query := func(dir, more string) string { return "&tls-certificates=" + dir + more }
	tcp := func(t *testing.T) (port string, addr *net.TCPAddr) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		addr = l.Addr().(*net.TCPAddr)
		return fmt.Sprint(addr.Port), addr
	}
	uses := func(t *testing.T, uri string) {
		t.Helper()
		d := open(t, uri, nil)
		require.True(t, d.Info().TLS)
		want := noise(3 << 20)
		_, err := d.WriteAt(want, 11)
		require.NoError(t, err)
		require.NoError(t, d.Sync())
		got := make([]byte, len(want))
		require.NoError(t, image.ReadFull(d, got, 11))
		require.True(t, bytes.Equal(want, got))
		require.NoError(t, d.Close())
	}
	t.Run("nbdkit", func(t *testing.T) {
		k := nbdkit(t, "--tls=require", "--tls-certificates="+certs.dir, "--tls-verify-peer", "memory", "4M")
		uses(t, "nbds+unix:///?socket="+k.sock+query(certs.dir, ""))
		_, err := nbd.Open(context.Background(), k.uri(""), nil)
		require.ErrorIs(t, err, nbd.ErrTLSRequired)
		_, err = nbd.Open(context.Background(), "nbds+unix:///?socket="+k.sock+query(certs.dir, "&tls-hostname=other"), nil)
		require.ErrorContains(t, err, "not other")
		_, err = nbd.Open(context.Background(), "nbds+unix:///?socket="+k.sock+query(newCA(t).dir, ""), nil)
		require.ErrorContains(t, err, "certificate")
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		port, _ := tcp(t)
		file := blank(t, 4<<20)
		p := start(t, "tcp:127.0.0.1:"+port, "qemu-nbd", "-t", "-f", "raw", "-e", "8", "-b", "127.0.0.1", "-p", port,
			"--object", "tls-creds-x509,id=tls0,endpoint=server,dir="+certs.dir+",verify-peer=on", "--tls-creds", "tls0", file)
		uses(t, "nbds://127.0.0.1:"+port+"/?"+query(certs.dir, ""))
		_, err := nbd.Open(context.Background(), "nbd://127.0.0.1:"+port+"/", nil)
		require.ErrorIs(t, err, nbd.ErrTLSRequired, "%s", p.sock)
	})
	t.Run("a server without", func(t *testing.T) {
		k := nbdkit(t, "memory", "4M")
		_, err := nbd.Open(context.Background(), "nbds+unix:///?socket="+k.sock+query(certs.dir, ""), nil)
		require.ErrorIs(t, err, nbd.ErrTLSRequired)
	})
	t.Run("our server, clients of others", func(t *testing.T) {
		s := serve(t, &nbd.ServerOptions{TLS: certs.server(t, true)}, &nbd.Export{Name: "x", Device: imagetest.NewMemory(4 << 20)})
		uri := "nbds+unix:///x?socket=" + s.sock + query(certs.dir, "")
		uses(t, uri)
		run(t, "nbdcopy", uri, filepath.Join(t.TempDir(), "copy"))
		run(t, "qemu-io", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+certs.dir, "-c", "write -P 5 0 1M", "-c", "read -P 5 0 1M",
			"--image-opts", "driver=nbd,server.type=unix,server.path="+s.sock+",export=x,tls-creds=t,tls-hostname=localhost")
		_, err := nbd.Open(context.Background(), "nbds+unix:///x?socket="+s.sock+query(certs.only(t, "ca-cert.pem"), ""), nil)
		require.Error(t, err, "a client without a certificate")
		require.Error(t, s.first(t))
	})
}

// A power cut after a Sync through client and server loses nothing of what was
// written before.
func TestDurability(t *testing.T) {
	seed := imagetest.Seed(t)
	for round := range imagetest.Scale(20) {
		under := imagetest.NewCrash(1<<20, nil)
		s := serve(t, nil, &nbd.Export{Name: "x", Device: under})
		d := open(t, s.uri("x"), nil)
		model := map[int64]byte{}
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		for range 30 {
			off, b := rng.Int64N(1<<20), byte(1+rng.IntN(255))
			var err error
			if rng.IntN(3) == 0 {
				_, err = d.WriteDurable([]byte{b}, off)
				model[off] = b
			} else {
				_, err = d.WriteAt([]byte{b}, off)
				require.NoError(t, d.Sync())
				model[off] = b
			}
			require.NoError(t, err)
		}
		_, err := d.WriteAt(bytes.Repeat([]byte{0}, 4096), 0) // not synced
		require.NoError(t, err)
		after := under.PowerCut(func(int, int64) bool { return false })
		for off, b := range model {
			p := make([]byte, 1)
			require.NoError(t, image.ReadFull(after, p, off))
			require.Equal(t, b, p[0], "byte %d", off)
		}
		require.NoError(t, d.Close())
		require.NoError(t, s.Close())
	}
}
