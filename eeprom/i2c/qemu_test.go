package i2c_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/internal/qtest"
)

// A bus is what a driver of EEPROMs needs of its master.
type bus interface {
	Start(device byte, read bool) (ack bool, err error)
	Send(b byte) (ack bool, err error)
	Receive() (byte, error)
	Stop() error
}

// ours is a bus with one of our chips.
type ours struct{ *i2c.Chip }

func (o ours) Start(device byte, read bool) (bool, error) {
	return o.Chip.Start(device, read) == nil, nil
}
func (o ours) Send(b byte) (bool, error) { return o.WriteByte(b) == nil, nil }
func (o ours) Receive() (byte, error)    { return o.ReadByte() }

// qemus is a bus of an AST2600 in QEMU.
type qemus struct{ *qtest.AspeedI2C }

func (q qemus) Send(b byte) (bool, error) { return q.AspeedI2C.Send(0, b) }
func (q qemus) Receive() (byte, error)    { return q.AspeedI2C.Receive(false) }

// run carries out transfers; the text is what the master sees.
func run(t *testing.T, b bus, list ...transfer) string {
	var log bytes.Buffer
	for _, x := range list {
		ack, err := b.Start(x.device, x.read)
		require.NoError(t, err)
		fmt.Fprintf(&log, "S%02x%t ", x.device, ack)
		for _, v := range x.bytes {
			switch {
			case !ack:
			case x.read:
				v, err = b.Receive()
				require.NoError(t, err)
				fmt.Fprintf(&log, "%02x ", v)
			default:
				ok, err := b.Send(v)
				require.NoError(t, err)
				fmt.Fprintf(&log, "%t ", ok)
			}
		}
		if x.stop {
			require.NoError(t, b.Stop())
		}
	}
	return log.String()
}

// at24c starts a board with QEMU's EEPROM of a size at 0x50, on an erased image.
func at24c(t *testing.T, size int64) (qemus, string) {
	path := filepath.Join(t.TempDir(), "eeprom")
	require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte{0xff}, int(size)), 0o600))
	m, err := qtest.Start("qemu-system-arm", "-M", "ast2600-evb", "-nodefaults", "-blockdev", "driver=file,node-name=e,filename="+path,
		"-device", fmt.Sprintf("at24c-eeprom,bus=aspeed.i2c.bus.3,address=0x50,drive=e,rom-size=%d", size))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	b, err := m.AspeedI2C(3)
	require.NoError(t, err)
	return qemus{b}, path
}

// A driver that keeps within pages sees the same of QEMU's at24c-eeprom and of
// ours, and both store the same bytes.
func TestQEMUAgrees(t *testing.T) {
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	for _, name := range []string{"24C32", "24C256", "24C512"} {
		t.Run(name, func(t *testing.T) {
			c, mem := chip(t, name, nil)
			p := c.Part()
			q, path := at24c(t, p.Size)
			n := imagetest.Scale(120)
			for i := range n {
				list := access(rng, p)
				require.Equal(t, run(t, q, list...), run(t, ours{c}, list...), "access %d: %+v", i, list)
			}
			stored, err := os.ReadFile(path)
			require.NoError(t, err)
			require.True(t, bytes.Equal(stored, mem.Data))
			t.Logf("%d accesses alike", n)
		})
	}
}

// access is what a driver does: a write within a page, a random read, a read
// from where the last one ended, or a probe of some address.
func access(rng *rand.Rand, p i2c.Part) []transfer {
	at := rng.Int64N(p.Size)
	addr := []byte{byte(at >> 8), byte(at)}
	switch rng.IntN(5) {
	case 0, 1:
		room := p.Page - int(at)%p.Page
		data := make([]byte, 1+rng.IntN(room))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		// Behind the last byte of a page the counters differ: go elsewhere.
		return []transfer{{device: 0x50, bytes: append(addr, data...), stop: true}, {device: 0x50, bytes: addr, stop: true}}
	case 2:
		return []transfer{{device: 0x50, bytes: addr}, {device: 0x50, read: true, bytes: make([]byte, 1+rng.IntN(80)), stop: true}}
	case 3:
		return []transfer{{device: 0x50, read: true, bytes: make([]byte, 1+rng.IntN(8)), stop: true}}
	default:
		return []transfer{{device: byte(0x51 + rng.IntN(7)), read: rng.IntN(2) == 0, stop: true}}
	}
}

// Where QEMU's model and the data sheets differ, ours is with the data sheets.
// If one of these fails, QEMU has changed.
func TestQEMUDiffers(t *testing.T) {
	write := func(p ...byte) transfer { return transfer{device: 0x50, bytes: p, stop: true} }
	read := func(n int) transfer { return transfer{device: 0x50, read: true, bytes: make([]byte, n), stop: true} }
	set := func(hi, lo byte) transfer { return transfer{device: 0x50, bytes: []byte{hi, lo}} }
	const setLog = "S50true true true S50true "
	for _, d := range []struct {
		name, part string
		do, see    []transfer
		qemu, ours string
	}{
		{"a page's end doesn't wrap", "24C256", []transfer{write(0, 64, 0x55), write(0, 63, 1, 2)}, []transfer{set(0, 63), read(2)},
			setLog + "01 02 ", setLog + "01 55 "},
		{"a start condition after data doesn't drop it", "24C256",
			[]transfer{set(0, 0), {device: 0x50, bytes: []byte{0, 0, 7}}, {device: 0x50, stop: true}},
			[]transfer{set(0, 0), read(1)}, setLog + "07 ", setLog + "ff "},
		{"the counter leaves the page behind its last byte", "24C256", []transfer{write(0, 64, 0x55), write(0, 127, 9)}, []transfer{read(1)},
			"S50true ff ", "S50true 55 "},
		{"half an address counts", "24C256", []transfer{write(5, 1, 0x66), write(0, 5), write(1)}, []transfer{read(1)},
			"S50true 66 ", "S50true ff "},
		{"no address bits in the device address", "24C16", nil, []transfer{{device: 0x57, stop: true}},
			"S57false ", "S57true "},
	} {
		t.Run(d.name, func(t *testing.T) {
			c, _ := chip(t, d.part, nil)
			q, _ := at24c(t, c.Part().Size)
			run(t, q, d.do...)
			run(t, ours{c}, d.do...)
			require.Equal(t, d.qemu, run(t, q, d.see...), "QEMU")
			require.Equal(t, d.ours, run(t, ours{c}, d.see...), "ours")
		})
	}
}
