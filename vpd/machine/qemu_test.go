package machine_test

import (
	"encoding/binary"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
	"nvstore.dev/vpd/machine"
)

// The templates of network cards pack to the words that a driver reads from
// QEMU's cards.
func TestQEMUHasOurWords(t *testing.T) {
	for device, shift := range map[string]int{"e1000": 8, "e1000-82545em": 8, "e1000-82544gc": 8, "e1000e": 2} {
		t.Run(device, func(t *testing.T) {
			const mac, bar, eerd = "52:54:00:ab:cd:ef", 0xe0000000, 0x14
			x := make1(t, `{"manifest": 1, "blobs": {"nvm": {"template": "`+device+`"}}}`, 1, map[string]string{"mac": mac})
			m, err := qtest.Start("qemu-system-x86_64", "-M", "pc", "-nodefaults", "-device", device+",addr=4,mac="+mac)
			require.NoError(t, err)
			defer m.Close()
			require.NoError(t, m.PCI(4, 0).Map(0, bar))
			var words []byte
			for i := range 64 {
				require.NoError(t, m.Write(32, bar+eerd, uint64(i)<<shift|1))
				v, err := m.Read(32, bar+eerd)
				require.NoError(t, err)
				words = binary.LittleEndian.AppendUint16(words, uint16(v>>16))
			}
			require.Equal(t, words, x.Blobs[0].Content)
		})
	}
}

var busLine = regexp.MustCompile(`^bus: (\S+)`)

// eeproms lists a machine's, from "info qtree": how many there are of which
// size at which address.
func eeproms(t *testing.T, name string) map[string]int {
	m, err := qtest.Start("qemu-system-arm", "-M", name, "-nodefaults")
	require.NoError(t, err)
	defer m.Close()
	tree, err := m.HMP("info qtree")
	require.NoError(t, err)
	list := map[string]int{}
	kind, size := "", ""
	for line := range strings.SplitSeq(tree, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "dev: "):
			kind, size = strings.TrimSuffix(strings.Fields(line)[1], ","), "256"
		case busLine.MatchString(line):
			kind = ""
		case strings.HasPrefix(line, "rom-size = "):
			size = strings.Fields(line)[2]
		case strings.HasPrefix(line, "address = ") && (kind == "at24c-eeprom" || kind == "smbus-eeprom"):
			addr, err := strconv.Atoi(strings.Fields(line)[2])
			require.NoError(t, err)
			list[fmt.Sprintf("%#x: %s", addr, size)]++
		}
	}
	return list
}

// bits: QEMU 7.2 took the bits of Fuji's smaller EEPROMs for bytes.
var bits = map[string]string{
	"0x50: 2048": "0x50: 256", "0x52: 2048": "0x52: 256", "0x51: 65536": "0x51: 8192", "0x52: 65536": "0x52: 8192", "0x53: 65536": "0x53: 8192",
}

// The boards that Debian's QEMU has too have the EEPROMs of our templates.
// Bus names in QEMU's tree are no numbers behind multiplexers, so addresses and
// sizes are compared.
func TestQEMUHasOurEEPROMs(t *testing.T) {
	m, err := qtest.Start("qemu-system-arm", "-M", "none")
	require.NoError(t, err)
	raw, err := m.QMP("query-machines", nil)
	require.NoError(t, err)
	require.NoError(t, m.Close())
	tested := 0
	for _, tm := range machine.Templates() {
		if tm.Blob || testing.Short() && tm.Name > "b" && tm.Name != "rainier-bmc" || !strings.Contains(string(raw), `"`+tm.Name+`"`) {
			continue
		}
		t.Run(tm.Name, func(t *testing.T) {
			m, err := machine.Parse(tm.Manifest())
			require.NoError(t, err)
			x, err := m.Make(1, nil)
			require.NoError(t, err)
			want := map[string]int{}
			for _, b := range x.Blobs {
				addr, err := strconv.ParseUint(strings.TrimSuffix(b.Name, "/eeprom")[len(b.Name)-len("0050/eeprom"):], 16, 8)
				require.NoError(t, err)
				want[fmt.Sprintf("%#x: %d", addr, len(b.Content))]++
			}
			got := eeproms(t, tm.Name)
			if tm.Name == "fuji-bmc" {
				for wrong, right := range bits {
					if n, ok := got[wrong]; ok {
						delete(got, wrong)
						got[right] += n
					}
				}
			}
			require.Equal(t, want, got)
			tested++
		})
	}
	require.GreaterOrEqual(t, tested, map[bool]int{false: 10, true: 3}[testing.Short()])
}
