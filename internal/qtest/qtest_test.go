package qtest_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
)

func start(t *testing.T, binary string, args ...string) *qtest.Machine {
	m, err := qtest.Start(binary, args...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// The words of e1000's EEPROM add up, as a driver reads them over PCI.
func TestPCI(t *testing.T) {
	m := start(t, "qemu-system-x86_64", "-M", "pc", "-nodefaults", "-device", "e1000,addr=4,mac=52:54:00:12:34:56")
	nic := m.PCI(4, 0)
	id, err := nic.Config(0)
	require.NoError(t, err)
	require.Equal(t, uint32(0x100e8086), id)
	require.NoError(t, nic.Map(0, 0xe0000000))
	var sum uint16
	var words [64]uint16
	for i := range words {
		const eerd = 0xe0000014
		require.NoError(t, m.Write(32, eerd, uint64(i)<<8|1))
		v, err := m.Read(32, eerd)
		require.NoError(t, err)
		require.NotZero(t, v&0x10, "not done")
		words[i] = uint16(v >> 16)
		sum += words[i]
	}
	require.Equal(t, uint16(0xbaba), sum)
	require.Equal(t, []uint16{0x5452, 0x1200, 0x5634}, words[:3])

	require.Error(t, m.PCI(9, 0).Map(0, 0xe1000000))
}

// An EEPROM on an AST2600's I2C bus gives what its image has, and its image
// gets what is written.
func TestAspeedI2C(t *testing.T) {
	image := bytes.Repeat([]byte("nvstore."), 64)
	path := filepath.Join(t.TempDir(), "eeprom")
	require.NoError(t, os.WriteFile(path, image, 0o644))
	m := start(t, "qemu-system-arm", "-M", "ast2600-evb", "-nodefaults",
		"-drive", "if=none,id=f,format=raw,file="+path, "-device", "at24c-eeprom,bus=aspeed.i2c.bus.3,address=0x50,drive=f,rom-size=512")
	bus, err := m.AspeedI2C(3)
	require.NoError(t, err)
	got, err := bus.EEPROM(0x50, 2, len(image))
	require.NoError(t, err)
	require.Equal(t, image, got)
	require.NoError(t, bus.Write(0x50, []byte{0x01, 0x10, 'N', 'V'}))
	got, err = bus.Read(0x50, []byte{0x01, 0x10}, 8)
	require.NoError(t, err)
	require.Equal(t, "NVstore.", string(got))
	_, err = bus.EEPROM(0x33, 1, 1)
	require.ErrorContains(t, err, "no acknowledge")
	require.NoError(t, m.Quit())
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "NVstore.", string(after[0x110:0x118]))
}

func TestMemoryAndMonitor(t *testing.T) {
	m := start(t, "qemu-system-x86_64", "-M", "pc", "-nodefaults", "-m", "16M")
	require.NoError(t, m.WriteBytes(0x100000, []byte("some bytes")))
	got, err := m.ReadBytes(0x100000, 10)
	require.NoError(t, err)
	require.Equal(t, "some bytes", string(got))
	v, err := m.Read(64, 0x100000)
	require.NoError(t, err)
	require.Equal(t, uint64(0x74796220656d6f73), v)
	text, err := m.HMP("info status")
	require.NoError(t, err)
	require.Contains(t, text, "paused")
	_, err = m.QMP("no-such-command", nil)
	require.ErrorContains(t, err, "CommandNotFound")
	_, err = m.Do("nonsense")
	require.Error(t, err)
}

// What QEMU says of its arguments is in the error, and nothing stays behind.
func TestStartFails(t *testing.T) {
	_, err := qtest.Start("qemu-system-x86_64", "-M", "nonsense")
	require.ErrorContains(t, err, "unsupported machine type")
	_, err = qtest.Start("no-such-qemu")
	require.Error(t, err)
}
