package chain_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/nbd"
)

const uuid = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"

func TestLocations(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"vm.qcow2", "vm.qcow2"},
		{"./a,b=c", "./a,b=c"},
		{"nbd:x", "nbd:x"}, // no URI: a file of that name
		{"json:{}", "json:{}"},
		{"pebble:/srv/nv", "driver=pebble,dir=/srv/nv"},
		{"pebble:/srv/nv/", "driver=pebble,dir=/srv/nv/"},
		{"pebble:/srv/nv/" + uuid, "driver=pebble,dir=/srv/nv,machine=" + uuid},
		{"pebble:/srv/nv/" + strings.ToUpper(uuid), "driver=pebble,dir=/srv/nv,machine=" + uuid},
		{"pebble:/srv/" + uuid + "/", "driver=pebble,dir=/srv/" + uuid + "/"},
		{"pebble:" + uuid, "driver=pebble,dir=" + uuid},
		{"driver=file,filename=x", "driver=file,filename=x"},
		{"filename=x,driver=file", "driver=file,filename=x"},
		{"driver=host_device,filename=/dev/vdb", "driver=host_device,filename=/dev/vdb"},
		{"driver=file,filename=a,,b=c,,", "driver=file,filename=a,,b=c,,"},
		{"driver=qcow2,file.driver=file,file.filename=x", "driver=qcow2,file.driver=file,file.filename=x"},
		{"driver=qcow2,file.filename=x", "driver=qcow2,file.driver=file,file.filename=x"},
		{"file.filename=x,driver=raw", "driver=raw,file.driver=file,file.filename=x"},
		{"driver=raw,offset=1k,file.filename=x", "driver=raw,offset=1024,file.driver=file,file.filename=x"},
		{"driver=raw,offset=0,size=0,file.filename=x", "driver=raw,offset=0,size=0,file.driver=file,file.filename=x"},
		{"driver=raw,size=3M,offset=2G,file.driver=qcow2,file.file.driver=raw,file.file.offset=1T,file.file.file.filename=x",
			"driver=raw,offset=2147483648,size=3145728,file.driver=qcow2,file.file.driver=raw,file.file.offset=1099511627776,file.file.file.driver=file,file.file.file.filename=x"},
		{"nbds://h/?tls-hostname=x", "driver=nbd,server.type=inet,server.host=h,server.port=10809,tls=on,tls-hostname=x"},
		{"nbds://me@h/?tls-psk-file=k", "driver=nbd,server.type=inet,server.host=h,server.port=10809,tls=on,tls-psk-file=k,tls-username=me"},
		{"nbd+unix:///a%20b?socket=/s,t", "driver=nbd,server.type=unix,server.path=/s,,t,export=a b"},
		{"driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=::1,file.export=x",
			"driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=::1,file.server.port=10809,file.export=x"},
		{"driver=qcow2,file.filename=x,data-file.filename=z,backing.driver=qcow2,backing.file.filename=y,backing.backing.driver=file,backing.backing.filename=w",
			"driver=qcow2,file.driver=file,file.filename=x,backing.driver=qcow2,backing.file.driver=file,backing.file.filename=y,backing.backing.driver=file,backing.backing.filename=w,data-file.driver=file,data-file.filename=z"},
		{"driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename=x,backing.driver=luks,backing.key-secret=l,backing.file.filename=y,backing.header.filename=z",
			"driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.driver=file,file.filename=x,backing.driver=luks,backing.key-secret=l,backing.file.driver=file,backing.file.filename=y,backing.header.driver=file,backing.header.filename=z"},
		{"driver=qcow2,file.driver=pebble,file.dir=d,file.machine=" + uuid, "driver=qcow2,file.driver=pebble,file.dir=d,file.machine=" + uuid},
	} {
		got, err := chain.Render(c.in)
		require.NoError(t, err, c.in)
		require.Equal(t, c.want, got, c.in)
	}
}

func TestBadLocations(t *testing.T) {
	deep := "driver=raw"
	prefix := ""
	for range 8 {
		prefix += "file."
		deep += "," + prefix + "driver=raw"
	}
	many := "driver=file,filename=x"
	for i := range 70 {
		many += ",k" + strings.Repeat("x", i) + "=1"
	}
	for _, c := range []struct {
		in, says string
		kind     error
	}{
		{"", "path", chain.ErrLocation},
		{"http://h/x", `"http"`, image.ErrUnsupported},
		{"nbd:///x", "host", chain.ErrLocation},
		{"nbd://h:port/x", "parse", nbd.ErrURI},
		{"nbd+unix:///x", "socket", chain.ErrLocation},
		{"nbd+unix:///x?socket=/s&sockets=2", "sockets", chain.ErrLocation},
		{"nbds://h/x?tls-type=anon", "anon", image.ErrUnsupported},
		{"nbds://h/x?tls-type=psk", "tls-psk-file", chain.ErrLocation},
		{"nbds://h/x?tls-psk-file=k&tls-certificates=d", "tls-psk-file", chain.ErrLocation},
		{"nbds://h/x?tls-psk-file=k&tls-type=x509", "tls-psk-file", chain.ErrLocation},
		{"nbd://h/x?tls-psk-file=k", "scheme", chain.ErrLocation},
		{"nbd://me@h/x", "user", chain.ErrLocation},
		{"nbds://me:secret@h/x?tls-psk-file=k", "user", chain.ErrLocation},
		{"file:///x", `"file"`, image.ErrUnsupported},
		{"pebble:", "dir", chain.ErrLocation},
		{"driver=", "driver", image.ErrUnsupported},
		{"driver=vdi,file.filename=x", `"vdi"`, image.ErrUnsupported},
		{"driver=nbd", "server.type", chain.ErrLocation},
		{"driver=nbd,server.type=unix", "server.path", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,server.host=h", "server.host", chain.ErrLocation},
		{"driver=nbd,server.type=inet,server.path=/s", "server.path", chain.ErrLocation},
		{"driver=nbd,server.type=inet", "server.host", chain.ErrLocation},
		{"driver=nbd,server.type=vsock,server.host=1", "server.type", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,tls-creds=t", "tls-creds", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,tls-psk-file=k", "tls", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,tls=on,tls-psk-file=k,tls-certificates=c", "tls-psk-file", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,tls=1", "tls", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,tls-hostname=h", "tls", chain.ErrLocation},
		{"driver=nbd,server.type=unix,server.path=/s,export=" + strings.Repeat("x", 4097), "4096", chain.ErrLocation},
		{"driver=qcow2,file.driver=vdi,file.file.filename=x", `file.driver: got "vdi"`, image.ErrUnsupported},
		{"driver=qcow2,file.driver=,file.filename=x", `file.driver`, image.ErrUnsupported},
		{"driver=file", "filename", chain.ErrLocation},
		{"driver=file,filename=", "filename", chain.ErrLocation},
		{"driver=file,filename=x,locking=off", "locking", chain.ErrLocation},
		{"driver=file,filename=x,file.filename=y", "file.filename", chain.ErrLocation},
		{"driver=file,filename=x,filename=y", "once", chain.ErrLocation},
		{"driver=file,filename=x,,driver=raw", "no such", nil}, // a strange name
		{"driver=qcow2", "file.filename", chain.ErrLocation},
		{"driver=qcow2,filename=x", "file.filename", chain.ErrLocation},
		{"driver=qcow2,file=x", "file.filename", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,file=y", ".file:", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,backing=y", "backing", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,backing.file.filename=y", "backing.driver", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,backing.driver=", "backing.driver", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,backing.driver=raw,backing.filename=y", "backing.file.filename", chain.ErrLocation},
		{"driver=raw,file.filename=x,backing.driver=file,backing.filename=y", "backing.driver", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,data-file.driver=vdi", `"vdi"`, image.ErrUnsupported},
		{"driver=qcow2,file.filename=x,data-file=y", "data-file", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,encrypt.format=luks,backing.driver=luks,backing.file.filename=y", "key-secret", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,offset=512", "offset", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,file.file.filename=y", "file.file.filename", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,", "key=value", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,=y", "key=value", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,on", "key=value", chain.ErrLocation},
		{"driver=qcow2,on,file.filename=x", "key=value", chain.ErrLocation},
		{"driver=raw,file.filename=x,offset=", "offset", chain.ErrLocation},
		{"driver=raw,file.filename=x,offset=-512", "offset", chain.ErrLocation},
		{"driver=raw,file.filename=x,offset=513", "offset", chain.ErrLocation},
		{"driver=raw,file.filename=x,offset=1.5k", "offset", chain.ErrLocation},
		{"driver=raw,file.filename=x,size=1KB", "size", chain.ErrLocation},
		{"driver=raw,file.filename=x,size=k", "size", chain.ErrLocation},
		{"driver=raw,file.filename=x,size=9223372036854775808", "size", chain.ErrLocation},
		{"driver=raw,file.filename=x,size=8388608T", "size", chain.ErrLocation},
		{"driver=raw,file.filename=x,size=8E", "size", chain.ErrLocation},
		{"driver=pebble,machine=" + uuid, "dir", chain.ErrLocation},
		{"driver=pebble,dir=/nowhere,machine=x", "machine", chain.ErrLocation},
		{deep, "8 nodes", chain.ErrLocation},
		{many, "64 keys", chain.ErrLocation},
		{strings.Repeat("x", 17<<10), "16384 bytes", chain.ErrLocation},
	} {
		d, err := chain.Open(c.in, nil)
		require.Nil(t, d, c.in)
		require.Error(t, err, c.in)
		if c.kind != nil {
			require.ErrorIs(t, err, c.kind, c.in)
		}
		require.Contains(t, err.Error(), c.says, c.in)
		require.Less(t, len(err.Error()), 17<<10)
	}
}

// What parses can be written in one form, which parses to itself: no value is
// lost, and none gets into another key.
func FuzzLocation(f *testing.F) {
	for _, s := range []string{
		"driver=qcow2,file.driver=file,file.filename=a,,b", "driver=raw,offset=1G,size=64M,file.driver=qcow2,file.file.filename=x",
		"pebble:/srv/nv/" + uuid, "driver=pebble,dir=d", "nbd://x", "nbds://[::1]:1/a%20b?tls-hostname=c", "nbd+unix:///x?socket=/s,",
		"driver=raw,size=1M,file.driver=nbd,file.server.type=inet,file.server.host=h", "vm.qcow2", ",driver=", "file.filename=x,driver=raw",
		"driver=file,filename=,,,,driver=raw",
		"driver=qcow2,file.filename=x,backing.driver=raw,backing.size=1M,backing.file.filename=y,data-file.filename=z",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		one, err := chain.Render(s)
		if err != nil {
			var loc *image.FormatError
			require.ErrorAs(t, err, &loc)
			return
		}
		two, err := chain.Render(one)
		require.NoError(t, err, one)
		require.Equal(t, one, two)
	})
}
