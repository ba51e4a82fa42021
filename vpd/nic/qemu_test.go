package nic_test

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
	"nvstore.dev/vpd/internal/formtest"
)

const base = 0xe0000000

// words reads the EEPROM of a card in QEMU.
func words(t *testing.T, device, mac string) []byte {
	m, err := qtest.Start("qemu-system-x86_64", "-M", "pc", "-nodefaults", "-device", device+",addr=4,mac="+mac)
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	r := readers[device]
	require.NoError(t, m.PCI(4, 0).Map(r.bar, r.addr))
	return r.read(t, m)
}

type reader struct {
	model string
	bar   int
	addr  uint32
	read  func(t *testing.T, m *qtest.Machine) []byte
}

const port = 0xc000

var readers = map[string]reader{
	"e1000":         {"8254x", 0, base, eerd(8, 0x10)},
	"e1000-82544gc": {"8254x", 0, base, eerd(8, 0x10)},
	"e1000-82545em": {"8254x", 0, base, eerd(8, 0x10)},
	"e1000e":        {"82574", 0, base, eerd(2, 2)},
	"i82550":        {"eepro100", 0, base, microwire(0x0e, 16, 0, 1, 2, 4, 8)},
	"i82557b":       {"eepro100", 0, base, microwire(0x0e, 16, 0, 1, 2, 4, 8)},
	"i82559c":       {"eepro100", 0, base, microwire(0x0e, 16, 0, 1, 2, 4, 8)},
	"rtl8139":       {"rtl8139", 1, base, microwire(0x50, 8, 0x80, 4, 8, 2, 1)},
	"tulip":         {"tulip", 1, base, microwire(0x48, 32, 1<<11|1<<14, 2, 1, 4, 8)},
	"pcnet":         {"pcnet", 0, port, aprom},
}

// eerd reads words through a gigabit card's EEPROM Read register.
func eerd(shift int, done uint64) func(t *testing.T, m *qtest.Machine) []byte {
	return func(t *testing.T, m *qtest.Machine) (image []byte) {
		for i := range 64 {
			require.NoError(t, m.Write(32, base+0x14, uint64(i)<<shift|1))
			v, err := m.Read(32, base+0x14)
			require.NoError(t, err)
			require.NotZero(t, v&done, "not done")
			image = binary.LittleEndian.AppendUint16(image, uint16(v>>16))
		}
		return image
	}
}

// microwire reads a 93C46 bit by bit.
func microwire(reg uint64, bits int, always, clock, choose, in, out uint64) func(t *testing.T, m *qtest.Machine) []byte {
	return func(t *testing.T, m *qtest.Machine) (image []byte) {
		set := func(v uint64) { require.NoError(t, m.Write(bits, base+reg, always|v)) }
		for addr := range uint64(64) {
			set(0)
			set(choose)
			for i := 8; i >= 0; i-- { // start bit, READ is 10b, six bits of address
				d := uint64(0)
				if (0b110<<6|addr)>>i&1 != 0 {
					d = in
				}
				set(choose | d)
				set(choose | d | clock)
			}
			var word uint16
			for range 16 {
				set(choose)
				set(choose | clock)
				v, err := m.Read(bits, base+reg)
				require.NoError(t, err)
				word <<= 1
				if v&out != 0 {
					word |= 1
				}
			}
			image = binary.LittleEndian.AppendUint16(image, word)
		}
		return image
	}
}

func aprom(t *testing.T, m *qtest.Machine) (image []byte) {
	for i := range uint16(16) {
		v, err := m.In(8, port+i)
		require.NoError(t, err)
		image = append(image, byte(v))
	}
	return image
}

// What each of QEMU's cards has is good, and its spec with another address
// packs to what the card has when it is given that address.
func TestQEMUHasOurWords(t *testing.T) {
	const first, second = "52:54:00:12:34:56", "02:fe:ed:f0:0d:11"
	for device, r := range readers {
		t.Run(device, func(t *testing.T) {
			image := words(t, device, first)
			require.Empty(t, f.Verify(image))
			require.True(t, f.Detect(image))
			formtest.CheckAny(t, f, image)
			spec, warnings, err := f.Parse(image)
			require.NoError(t, err)
			require.Empty(t, warnings)
			require.Contains(t, string(spec), `"model": "`+r.model+`"`)
			require.Equal(t, 1, strings.Count(string(spec), first))
			ours, warnings, err := f.Pack([]byte(strings.ReplaceAll(string(spec), first, second)))
			require.NoError(t, err)
			require.Empty(t, warnings)
			require.Equal(t, words(t, device, second), ours)
		})
	}
}

// Where a card has little but its address, the spec is in the fixtures.
func TestQEMUHasTheFixtures(t *testing.T) {
	for device, name := range map[string]string{"i82559c": "eepro100", "rtl8139": "rtl8139", "pcnet": "pcnet"} {
		ours, _, err := f.Pack(read(t, name+".nic.jsonc"))
		require.NoError(t, err)
		require.Equal(t, words(t, device, "52:54:00:12:34:56"), ours, device)
	}
}
