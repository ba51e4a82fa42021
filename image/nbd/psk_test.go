package nbd_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
)

func pskBytes(n byte) []byte { return bytes.Repeat([]byte{n, 0xA7}, 16) }

func newPSK(t *testing.T, identity string, n byte) *nbd.PSK {
	t.Helper()
	k, err := nbd.NewPSK(identity, pskBytes(n))
	require.NoError(t, err)
	return k
}

// keyFile makes a file of keys; QEMU wants this name, and the folder.
func keyFile(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.psk")
	require.NoError(t, os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600))
	return path
}

func pskLine(identity string, n byte) string { return fmt.Sprintf("%s:%x", identity, pskBytes(n)) }

func TestReadPSKs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made.psk")
	for _, user := range []string{"alice", "bob"} {
		run(t, "psktool", "-u", user, "-p", path)
	}
	keys, err := nbd.ReadPSKs(path)
	require.NoError(t, err)
	require.Len(t, keys, 2)
	require.Equal(t, "alice", keys[0].Identity())
	require.Equal(t, "bob", keys[1].Identity())

	keys, err = nbd.ReadPSKs(keyFile(t, "", pskLine("über uns", 1)+"\r", "#616263:"+strings.Repeat("AB", 16)))
	require.NoError(t, err)
	require.Equal(t, "über uns", keys[0].Identity())
	require.Equal(t, "abc", keys[1].Identity())
	for name, lines := range map[string][]string{
		"nothing":       {""},
		"no colon":      {"alice"},
		"no identity":   {":" + strings.Repeat("ab", 32)},
		"no key":        {"alice:"},
		"no digits":     {"alice:" + strings.Repeat("5x", 32)},
		"odd":           {"alice:" + strings.Repeat("5", 63)},
		"15 bytes":      {"alice:" + strings.Repeat("ab", 15)},
		"65 bytes":      {"alice:" + strings.Repeat("ab", 65)},
		"two colons":    {pskLine("alice", 1) + ":00"},
		"twice":         {pskLine("alice", 1), pskLine("alice", 2)},
		"control":       {pskLine("al\x1bice", 1)},
		"no UTF-8":      {pskLine("al\xffice", 1)},
		"long identity": {pskLine(strings.Repeat("x", 129), 1)},
		"odd identity":  {"#abc:" + strings.Repeat("ab", 32)},
		"too large":     {strings.Repeat("\n", 1<<20+1)},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := nbd.ReadPSKs(keyFile(t, lines...))
			require.ErrorIs(t, err, nbd.ErrKey)
			require.Nil(t, keys)
			_, said, _ := strings.Cut(err.Error(), "keys.psk")
			require.NotContains(t, said, "ab")
			require.NotContains(t, said, "a7")
			require.NotContains(t, said, "5x")
		})
	}
	_, err = nbd.ReadPSKs(path + "x")
	require.ErrorIs(t, err, os.ErrNotExist)
}

// A file that is taken has one key a line, each with another identity, and says
// the same when it is written anew.
func FuzzPSKs(f *testing.F) {
	for _, s := range []string{pskLine("alice", 1) + "\n", "\n" + pskLine("a", 1) + "\r\n#62:" + strings.Repeat("AB", 64), "a:b:c\n", "#:00\n"} {
		f.Add([]byte(s))
	}
	path := filepath.Join(f.TempDir(), "keys.psk")
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(path, data, 0o600))
		keys, err := nbd.ReadPSKs(path)
		if err != nil {
			require.ErrorIs(t, err, nbd.ErrKey)
			require.Nil(t, keys)
			return
		}
		require.LessOrEqual(t, len(keys), bytes.Count(data, []byte("\n"))+1)
		var anew []byte
		seen := map[string]bool{}
		for _, k := range keys {
			require.False(t, seen[k.Identity()])
			seen[k.Identity()] = true
			anew = fmt.Appendf(anew, "#%x:%x\n", k.Identity(), nbd.KeyOf(k))
		}
		require.NoError(t, os.WriteFile(path, anew, 0o600))
		again, err := nbd.ReadPSKs(path)
		require.NoError(t, err)
		for i, k := range keys {
			require.Equal(t, k.Identity(), again[i].Identity())
			require.Equal(t, nbd.KeyOf(k), nbd.KeyOf(again[i]))
		}
	})
}

// Nothing prints a key.
func TestPSKPrints(t *testing.T) {
	k := newPSK(t, "alice", 1)
	o := nbd.Options{PSK: k}
	for _, v := range []any{k, *k, o, &o, nbd.ServerOptions{PSKs: []*nbd.PSK{k}}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
			s := strings.ToLower(fmt.Sprintf(verb, v))
			require.NotContains(t, s, hex.EncodeToString(pskBytes(1))[:8], verb)
			require.NotContains(t, s, "167 1 167", verb)
			require.NotContains(t, s, "0xa7", verb)
		}
	}
	text, err := json.Marshal(k)
	require.NoError(t, err)
	require.Equal(t, "{}", string(text))
}

// usesTLS writes and reads through a target with TLS.
func usesTLS(t *testing.T, uri string, o *nbd.Options) {
	t.Helper()
	d := open(t, uri, o)
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

// TLS by a key with the servers of others, and what else their files have.
func TestPSKServers(t *testing.T) {
	file := keyFile(t, pskLine("bob", 2), pskLine("alice", 1))
	only := keyFile(t, pskLine("alice", 1))
	other := keyFile(t, pskLine("alice", 3), pskLine("eve", 1))
	check := func(t *testing.T, uri func(user, file string) string) {
		usesTLS(t, uri("alice@", file), nil)
		usesTLS(t, uri("bob@", file), nil)
		usesTLS(t, uri("", only), nil)
		usesTLS(t, strings.Replace(uri("", file), "tls-psk-file", "tls-hostname", 1), &nbd.Options{PSK: newPSK(t, "alice", 1)})
		for _, user := range []string{"alice@", "eve@"} {
			_, err := nbd.Open(context.Background(), uri(user, other), nil)
			require.ErrorContains(t, err, "it may not know the identity, or have another key for it")
		}
		_, err := nbd.Open(context.Background(), uri("carol@", file), nil)
		require.ErrorIs(t, err, image.ErrNotFound)
		_, err = nbd.Open(context.Background(), uri("", file), nil)
		require.ErrorIs(t, err, nbd.ErrURI)
		require.ErrorContains(t, err, "USER@")
		_, err = nbd.Open(context.Background(), strings.Replace(uri("", ""), "nbds", "nbd", 1), nil)
		require.Error(t, err)
	}
	t.Run("nbdkit", func(t *testing.T) {
		k := nbdkit(t, "--tls=require", "--tls-psk="+file, "memory", "4M")
		check(t, func(user, file string) string {
			return "nbds+unix://" + user + "/?socket=" + k.sock + "&tls-psk-file=" + file
		})
		_, err := nbd.Open(context.Background(), k.uri(""), nil)
		require.ErrorIs(t, err, nbd.ErrTLSRequired)
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		addr := l.Addr().String()
		require.NoError(t, l.Close())
		_, port, _ := net.SplitHostPort(addr)
		start(t, "tcp:"+addr, "qemu-nbd", "-t", "-f", "raw", "-e", "8", "-b", "127.0.0.1", "-p", port,
			"--object", "tls-creds-psk,id=tls0,endpoint=server,dir="+filepath.Dir(file), "--tls-creds", "tls0", blank(t, 4<<20))
		check(t, func(user, file string) string { return "nbds://" + user + addr + "/?tls-psk-file=" + file })
	})
	t.Run("a server with certificates", func(t *testing.T) {
		k := nbdkit(t, "--tls=require", "--tls-certificates="+newCA(t).dir, "memory", "4M")
		_, err := nbd.Open(context.Background(), "nbds+unix://alice@/?socket="+k.sock+"&tls-psk-file="+file, nil)
		require.ErrorIs(t, err, nbd.ErrDisconnected)
	})
}

// Our server with the clients of others.
func TestPSKClients(t *testing.T) {
	file := keyFile(t, pskLine("bob", 2), pskLine("alice", 1))
	other := keyFile(t, pskLine("alice", 3), pskLine("eve", 1))
	keys, err := nbd.ReadPSKs(file)
	require.NoError(t, err)
	s := serve(t, &nbd.ServerOptions{PSKs: keys}, &nbd.Export{Name: "x", Device: imagetest.NewMemory(4 << 20)})
	uri := func(user, file string) string {
		return "nbds+unix://" + user + "@/x?socket=" + s.sock + "&tls-psk-file=" + file
	}
	usesTLS(t, uri("bob", file), nil)
	for _, user := range []string{"alice", "bob"} {
		var out struct {
			TLS     bool
			Exports []map[string]any
		}
		require.NoError(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri(user, file))), &out))
		require.True(t, out.TLS)
		require.Equal(t, 4194304.0, out.Exports[0]["export-size"])
		run(t, "qemu-io", "--object", "tls-creds-psk,id=t,endpoint=client,username="+user+",dir="+filepath.Dir(file),
			"-c", "write -P 5 0 1M", "-c", "read -P 5 0 1M", "-c", "aio_write -P 6 1M 1M", "-c", "aio_write -P 7 2M 1M", "-c", "aio_flush", "-c", "read -P 7 2M 1M",
			"--image-opts", "driver=nbd,server.type=unix,server.path="+s.sock+",export=x,tls-creds=t")
	}
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, "nbdcopy", "--connections=4", "--requests=16", uri("alice", file), copied)
	got, err := os.ReadFile(copied)
	require.NoError(t, err)
	require.Equal(t, bytes.Repeat([]byte{7}, 1<<20), got[2<<20:3<<20])
	run(t, "nbdcopy", "--flush", "--connections=4", copied, uri("bob", file))
	require.Contains(t, run(t, "nbdinfo", "--map", uri("alice", file)), "hole,zero")
	// Who goes without a word more isn't worth one.
	require.Empty(t, s.told())

	for _, user := range []string{"alice", "eve"} {
		_, err := nbd.Open(context.Background(), uri(user, other), nil)
		require.ErrorIs(t, err, nbd.ErrRefused)
	}
	_, err = nbd.Open(context.Background(), "nbds+unix:///x?socket="+s.sock+"&tls-certificates="+newCA(t).dir, nil)
	require.Error(t, err)
	require.Eventually(t, func() bool { return len(s.told()) == 3 }, 10*time.Second, time.Millisecond)
	require.Equal(t, s.told()[0].Error(), s.told()[1].Error(), "a wrong key, and an unknown identity")
}

// A client with a key takes nothing in plain, and nobody without it.
func TestPSKClientInsists(t *testing.T) {
	key := newPSK(t, "alice", 1)
	plain := serve(t, nil, &nbd.Export{Name: "x", Device: imagetest.NewMemory(4096)})
	_, err := nbd.Open(context.Background(), plain.uri("x"), &nbd.Options{PSK: key})
	require.ErrorIs(t, err, nbd.ErrTLSRequired)
	t.Run("injection", func(t *testing.T) {
		o := fake(t, func(_ *testing.T, c net.Conn) {
			if hello(c) {
				nextOption(c)
				send(c, replyMagic, uint32(5), ack, uint32(0), replyMagic, uint32(8), ack, uint32(0))
			}
		})
		o.PSK = key
		_, err := dialFake(o)
		require.ErrorIs(t, err, nbd.ErrProtocol)
		require.ErrorContains(t, err, "nothing in plain after the acknowledgement")
	})
	for name, answer := range map[string]string{
		"plain":   "\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x00\x00\x00\x01",
		"garbage": "\x16\x03\x03\x00\x04\x02\x00\x00\x00",
		"alert":   "\x15\x03\x03\x00\x02\x02\x28",
		"nothing": "",
	} {
		t.Run(name, func(t *testing.T) {
			o := fake(t, func(_ *testing.T, c net.Conn) {
				if !hello(c) {
					return
				}
				if _, _, ok := nextOption(c); !ok || !optReply(c, 5, ack) {
					return
				}
				var header [5]byte // of the ClientHello's record
				if _, err := io.ReadFull(c, header[:]); err == nil && discard(c, int64(be.Uint16(header[3:]))) && send(c, answer) && answer != "" {
					discard(c, 1<<40)
				}
			})
			o.PSK = key
			d, err := dialFake(o)
			require.Error(t, err)
			require.Nil(t, d)
			kind := map[string]error{"plain": nbd.ErrProtocol, "garbage": nbd.ErrProtocol, "alert": nbd.ErrRefused, "nothing": nbd.ErrDisconnected}[name]
			require.ErrorIs(t, err, kind)
		})
	}
}
