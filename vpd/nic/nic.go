// Package nic packs and parses the EEPROMs of Ethernet cards that emulators
// have, which are words of 16 bits, little-endian, in a Microwire or SPI
// memory or in flash.
//
//	model      chips                              checksums
//	8254x      Intel 82540 to 82547 (e1000)       words 0x00 to 0x3f sum up to 0xbaba
//	82574      Intel 82574 (e1000e)               the same
//	82576      Intel 82576 (igb)                  the same
//	i210       Intel I210, I211                   the same
//	i350       Intel I350                         the same for each port: from words 0x00, 0x80, 0xc0 and 0x100
//	intel-gbe  another of Intel's gigabit chips   the same as 8254x
//	eepro100   Intel 8255x                        all words sum up to 0xbaba
//	rtl8139    Realtek RTL8139                    none
//	tulip      DEC 21143 and the like             CRC-8 of the ID block, CRC-32 (its lower half) of all
//	pcnet      AMD PCnet: the 16-byte address PROM   sum of bytes
//
// After the chips' data sheets (Intel: "PCI/PCI-X Family of Gigabit Ethernet
// Controllers Software Developer's Manual", EEPROM address map; the NVM maps of
// the 82574, I210 and I350 data sheets; "82559 EEPROM Map and Programming
// Information", AP-394; DEC: "Digital Semiconductor 21X4 Serial ROM Format";
// AMD: Am79C970A, "Address PROM") and what Linux's drivers read.
//
// The spec:
//
//	{
//	  "format": "nic",
//	  "model": "8254x",
//	  "mac": "52:54:00:12:34:56",
//	  "pba": "E21300-001",           // Intel: board number; or "string at 0x00f0", and "pba_string"
//	  "init_control_1": "0x4403",    // words have names, as below
//	  "device_id": "0x100e",
//	  "patches": [{"offset": "0x20", "type": "hex", "data": "..."}],  // what has no name
//	  "size": 128, "fill": "0xff"
//	}
//
// Fields lie over patches. Checksums are computed; "checksum" in a spec is a
// wrong one.
package nic

import (
	"encoding/binary"
	"errors"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/table"
)

// Name is the format's name in a spec.
const Name = "nic"

// MaxSize is the most bytes an image may have: twice the largest memory that
// the chips address.
const MaxSize = 64 << 10

var format = table.New(table.Def{
	Name: Name, Title: "Network card EEPROM", Member: "model", MaxSize: MaxSize,
	Layouts: layouts, Pick: pick, Plain: plain,
})

// Format returns the format.
func Format() vpd.Format { return format }

var layouts = []*table.Layout{
	intel8254x, intel82574, intel82576, intelI210, intelI350, intelOther, eepro100, rtl8139, tulip, pcnet,
}

// word reads a word, which is 0 behind the image's end.
func word(image []byte, n int) uint16 {
	if 2*n+2 > len(image) {
		return 0
	}
	return binary.LittleEndian.Uint16(image[2*n:])
}

func sumWords(b []byte) (sum uint16) {
	for i := 0; i+1 < len(b); i += 2 {
		sum += binary.LittleEndian.Uint16(b[i:])
	}
	return sum
}

// unicast tells whether bytes are an address that a card can have.
func unicast(mac []byte) bool { return mac[0]&1 == 0 && !table.Blank(mac) }

// pick tells the models apart: by signatures where they have some, Intel's by
// the device ID.
func pick(image []byte) (*table.Layout, error) {
	switch {
	case len(image) == pcnet.Size:
		if string(image[14:]) == "WW" {
			return pcnet, nil
		}
		return nil, errors.New("16 bytes that don't end with WW, as pcnet has them")
	case len(image) < 128:
		return nil, errors.New("has less than 64 words")
	case len(image)%2 != 0:
		return nil, errors.New("has half a word")
	case word(image, 0) == rtl8139ID:
		return rtl8139, nil
	}
	if l := intelModel(word(image, devIDWord)); l != nil {
		return l, nil
	}
	id := word(image, devIDWord)
	blank := id == 0 || id == 0xffff
	switch {
	case image[18] >= 1 && image[18] <= 4 && image[19] >= 1 && image[19] <= 8 && unicast(image[20:26]):
		return tulip, nil
	case !unicast(image[:6]):
		return nil, errors.New("no model's signature, and no MAC address in front")
	case !blank && (word(image, vendorIDWord) == intelID || sumWords(image[:128]) == intelSum):
		return intelOther, nil
	case blank && word(image, phyWord) != 0 && word(image, phyWord) != 0xffff:
		return eepro100, nil
	}
	return nil, errors.New("no model's signature")
}

// plain: right sums alone are no proof, where there are none, or words are
// zero. A device ID of Intel's with a vendor ID is one without.
func plain(l *table.Layout, image []byte, wrong int) bool {
	if !l.Has(image, "mac") {
		return false
	}
	switch l {
	case rtl8139:
		return len(image) == rtl8139.Size
	case intel8254x:
		return wrong == 0 || word(image, vendorIDWord) == intelID
	case intelI350:
		return wrong < len(l.Sums)
	case tulip:
		return wrong < len(l.Sums)
	case pcnet:
		return true
	}
	return wrong == 0
}
