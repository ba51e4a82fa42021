package nic

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/internal/table"
)

const (
	intelID  = 0x8086
	intelSum = 0xbaba

	pbaWord      = 0x08
	pbaGuard     = 0xfafa // in pbaWord: the next word points to a string
	initWord     = 0x0a
	devIDWord    = 0x0d
	vendorIDWord = 0x0e
	vpdWord      = 0x2f
	sumWord      = 0x3f
)

// Sections of the ports of an I350, by the word where they begin; the first is
// the image's own.
var portWords = []int{0, 0x80, 0xc0, 0x100}

var (
	intel8254x = intel("8254x", 128, 0x100e, identity, []table.Field{
		wordField("serdes_amplitude", 0x06), wordField("phy_class", 0x07), pba, pbaString, wordField("init_control_1", initWord)},
		ids, []table.Field{wordField("vendor_id", vendorIDWord)}, control)
	intel82574 = newer("82574", 128, 0x10d3)
	intel82576 = newer("82576", 2048, 0x10c9)
	intelI210  = newer("i210", 2048, 0x1533)
	intelI350  = i350()
	intelOther = intel("intel-gbe", 128, 0, identity, []table.Field{pba, pbaString, wordField("init_control_1", initWord)}, ids,
		[]table.Field{wordField("vendor_id", vendorIDWord)}, control)
)

// chips by device ID, where a driver of Linux has it.
var chips = map[string]map[uint16]string{
	"8254x": {
		0x1000: "82542", 0x1001: "82543GC", 0x1004: "82543GC", 0x1008: "82544EI", 0x1009: "82544EI", 0x100c: "82544GC", 0x100d: "82544GC",
		0x100e: "82540EM", 0x1015: "82540EM", 0x1016: "82540EP", 0x1017: "82540EP", 0x101e: "82540EP",
		0x100f: "82545EM", 0x1011: "82545EM", 0x1026: "82545GM", 0x1027: "82545GM", 0x1028: "82545GM",
		0x1010: "82546EB", 0x1012: "82546EB", 0x101d: "82546EB", 0x1079: "82546GB", 0x107a: "82546GB", 0x107b: "82546GB", 0x108a: "82546GB",
		0x1099: "82546GB", 0x10b5: "82546GB", 0x1013: "82541EI", 0x1014: "82541ER", 0x1018: "82541EI", 0x1076: "82541GI", 0x1077: "82541GI",
		0x1078: "82541ER", 0x107c: "82541GI", 0x1019: "82547EI", 0x101a: "82547EI", 0x1075: "82547GI",
	},
	"82574": {0x10d3: "82574L", 0x10f6: "82574LA"},
	"82576": {
		0x10c9: "82576", 0x10e6: "82576", 0x10e7: "82576", 0x10e8: "82576", 0x150a: "82576NS", 0x150d: "82576", 0x1518: "82576NS", 0x1526: "82576",
	},
	"i210": {
		0x1531: "I210", 0x1533: "I210", 0x1534: "I210", 0x1535: "I210", 0x1536: "I210", 0x1537: "I210", 0x1538: "I210", 0x1539: "I211",
		0x157b: "I210", 0x157c: "I210",
	},
	"i350": {0x151f: "I350", 0x1521: "I350", 0x1522: "I350", 0x1523: "I350", 0x1524: "I350", 0x1546: "I350"},
}

// intelModel returns the layout of a device ID, or nil.
func intelModel(id uint16) *table.Layout {
	for _, l := range layouts {
		if chips[l.Name][id] != "" {
			return l
		}
	}
	return nil
}

func chipOf(b []byte) string {
	for _, ids := range chips {
		if name := ids[binary.LittleEndian.Uint16(b)]; name != "" {
			return name
		}
	}
	return ""
}

func wordField(name string, n int) table.Field {
	return table.Field{Name: name, Off: 2 * n, Len: 2, Kind: table.Hex()}
}

func about(doc string, fd table.Field) table.Field {
	fd.Doc = doc
	return fd
}

var (
	identity = []table.Field{
		{Name: "mac", Off: 0, Len: 6, Kind: table.MAC(), Required: true}, wordField("compatibility", 0x03), wordField("id_led_settings", 0x04),
	}
	ids = []table.Field{
		wordField("subsystem_id", 0x0b), wordField("subsystem_vendor_id", 0x0c),
		{Name: "device_id", Off: 2 * devIDWord, Len: 2, Kind: table.Hex(), Meaning: chipOf},
	}
	control = []table.Field{
		wordField("init_control_2", 0x0f), wordField("init_control_3", 0x24),
		wordField("boot_agent_main", 0x30), wordField("boot_agent_custom", 0x31),
		wordField("boot_agent_version", 0x32), wordField("boot_agent_capabilities", 0x33),
	}
	pba = table.Field{Name: "pba", Off: 2 * pbaWord, Len: 4, Kind: pbaKind(),
		Doc: "Printed board assembly number, such as E21300-001; or where its string is, such as: string at 0x00f0"}
	pbaString = table.Field{Name: "pba_string", At: pbaSection, Kind: pbaStringKind(), Doc: "Printed board assembly number, where pba says"}
)

func babaSum(name string, first int) table.Sum {
	return table.Sum{Name: name, Title: "checksum", Off: 2 * (first + sumWord), Len: 2, From: 2 * first, To: 2 * (first + sumWord),
		Of: func(b []byte) uint64 { return uint64(intelSum - sumWords(b)) }}
}

// intel makes a layout of groups of fields. Init ID is the device ID of a spec
// that doesn't have one.
func intel(name string, size int, initID uint16, groups ...[]table.Field) *table.Layout {
	l := &table.Layout{Name: name, Size: size, Min: 128, Fill: 0xff, Align: 2, Fields: slices.Concat(groups...), Sums: []table.Sum{babaSum("checksum", 0)}}
	if initID != 0 {
		l.Signature = []table.Patch{{Off: 2 * devIDWord, Data: binary.LittleEndian.AppendUint16(nil, initID)}}
	}
	if name == "8254x" {
		l.Signature = append(l.Signature, table.Patch{Off: 2 * initWord, Data: []byte{0x00, 0x40}})
		l.Check = checkSignature
	}
	return l
}

// newer are the chips with PCI Express: their NVM can have VPD and alternate
// addresses.
func newer(name string, size int, initID uint16) *table.Layout {
	l := intel(name, size, initID, identity,
		[]table.Field{wordField("nvm_version", 0x05), pba, pbaString, wordField("init_control_1", initWord)}, ids, control,
		[]table.Field{
			about("Word where PCI VPD begins; 0xffff if there is none", wordField("vpd_pointer", vpdWord)),
			about("Word where the ports' alternate addresses begin; 0xffff if there are none", wordField("alternate_mac_pointer", 0x37)),
		})
	l.Check = checkPointers
	return l
}

func i350() *table.Layout {
	l := newer("i350", 2048, 0x1521)
	for i, first := range portWords[1:] {
		name := fmt.Sprintf("lan%d.", i+1)
		l.Fields = append(l.Fields,
			table.Field{Name: name + "mac", Off: 2 * first, Len: 6, Kind: table.MAC()},
			wordField(name+"init_control_2", first+0x0f), wordField(name+"init_control_3", first+0x24))
		l.Sums = append(l.Sums, babaSum(name+"checksum", first))
	}
	l.Min = 2 * (portWords[3] + sumWord + 1)
	return l
}

// checkSignature: in a 93C46, the chip looks for a signature before it uses
// anything else.
func checkSignature(image []byte) []vpd.Problem {
	if v := word(image, initWord); v>>14 != 1 {
		return []vpd.Problem{{Area: "init_control_1", Off: 2 * initWord, Msg: "the chip takes the EEPROM for empty: bits 15:14 are its signature",
			Got: fmt.Sprintf("%02bb", v>>14), Want: "01b"}}
	}
	return nil
}

func checkPointers(image []byte) (list []vpd.Problem) {
	if v := word(image, vpdWord); v != 0 && v != 0xffff && 2*int(v) >= len(image) {
		list = append(list, vpd.Problem{Area: "vpd_pointer", Off: 2 * vpdWord, Msg: "points behind the image", Got: fmt.Sprintf("word 0x%04x", v)})
	}
	return list
}

// pbaSection finds the string of the board number: its length in words, this
// one included, and two characters in each, the first in the upper half.
func pbaSection(image []byte) (off, n int, ok bool) {
	if word(image, pbaWord) != pbaGuard {
		return 0, 0, false
	}
	first := int(word(image, pbaWord+1))
	if off = 2 * first; off+4 > len(image) {
		return off, 0, off < len(image)
	}
	if n = 2 * int(word(image, first)); n < 4 || n > len(image)-off {
		n = 0
	}
	return off, n, true
}

var (
	pbaNumber = regexp.MustCompile(`^[0-9A-F]{6}-0[0-9A-F]{2}$`)
	pbaAt     = regexp.MustCompile(`^string at 0x[0-9a-f]{4}$`)
)

// pbaKind is the two words of the board number: eight digits, or where the
// string is.
func pbaKind() table.Kind {
	return table.Kind{
		Show: func(b []byte) (any, bool) {
			hi, lo := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:])
			if hi == pbaGuard {
				return fmt.Sprintf("string at 0x%04x", lo), true
			}
			return fmt.Sprintf("%04X%02X-0%02X", hi, lo>>8, lo&0xff), true
		},
		Read: func(path string, raw json.RawMessage, _ int) ([]byte, error) {
			s, err := spec.String(path, raw)
			if err != nil {
				return nil, err
			}
			digits := ""
			switch {
			case pbaAt.MatchString(s):
				digits = "FAFA" + s[len(s)-4:]
			case pbaNumber.MatchString(s):
				digits = s[:6] + s[8:]
			default:
				return nil, spec.Errorf(path, "want a number such as E21300-001, or a place such as: string at 0x00f0")
			}
			v, err := strconv.ParseUint(digits, 16, 32)
			if err != nil {
				return nil, spec.Errorf(path, "%v", err)
			}
			return []byte{byte(v >> 16), byte(v >> 24), byte(v), byte(v >> 8)}, nil
		},
		Schema: func(int) string {
			return `{"type": "string", "pattern": "^([0-9A-F]{6}-0[0-9A-F]{2}|string at 0x[0-9a-f]{4})$"}`
		},
	}
}

func pbaStringKind() table.Kind {
	const limit = 64 // characters; they have 11
	swapped := func(b []byte) []byte {
		out := make([]byte, len(b))
		for i := range b {
			out[i^1] = b[i]
		}
		return out
	}
	shown := func(b []byte) (string, bool) {
		text := swapped(b[2:])
		if n := len(text); text[n-1] == 0 {
			text = text[:n-1]
		}
		return string(text), spec.IsText(text) && len(text) > 0 && len(text) <= limit
	}
	return table.Kind{
		Show: func(b []byte) (any, bool) { return shown(b) },
		Read: func(path string, raw json.RawMessage, n int) ([]byte, error) {
			s, err := spec.String(path, raw)
			if err != nil {
				return nil, err
			}
			text := []byte(s)
			if !spec.IsText(text) || len(text) == 0 || len(text) > limit {
				return nil, spec.Errorf(path, "want 1 to %d printable ASCII characters", limit)
			}
			if len(text)%2 != 0 {
				text = append(text, 0)
			}
			if len(text)+2 > n {
				return nil, spec.Errorf(path, "%d bytes, and %d are left in the image", len(text)+2, n)
			}
			return append(binary.LittleEndian.AppendUint16(nil, uint16(1+len(text)/2)), swapped(text)...), nil
		},
		Check: func(b []byte) string {
			if _, ok := shown(b); !ok {
				return "is not printable ASCII"
			}
			return ""
		},
		Schema: func(int) string { return fmt.Sprintf(`{"type": "string", "pattern": "^[ -~]{1,%d}$"}`, limit) },
	}
}
