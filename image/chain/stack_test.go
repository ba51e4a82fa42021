package chain_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
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
		{"nbd://h:10809/x", `"nbd"`, image.ErrUnsupported},
		{"nbd+unix:///x?socket=/s", `"nbd+unix"`, image.ErrUnsupported},
		{"file:///x", `"file"`, image.ErrUnsupported},
		{"pebble:", "dir", chain.ErrLocation},
		{"driver=", "driver", image.ErrUnsupported},
		{"driver=luks,file.filename=x", `"luks"`, image.ErrUnsupported},
		{"driver=nbd,server.type=unix,server.path=/s", `"nbd"`, image.ErrUnsupported},
		{"driver=qcow2,file.driver=luks,file.file.filename=x", `file.driver: got "luks"`, image.ErrUnsupported},
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
		{"driver=qcow2,file.filename=x,backing.file.filename=y", "backing.file.filename", chain.ErrLocation},
		{"driver=qcow2,file.filename=x,data-file.filename=y", "data-file.filename", chain.ErrLocation},
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
		"pebble:/srv/nv/" + uuid, "driver=pebble,dir=d", "nbd://x", "vm.qcow2", ",driver=", "file.filename=x,driver=raw",
		"driver=file,filename=,,,,driver=raw",
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
