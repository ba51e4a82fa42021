package nic

import (
	"hash/crc32"

	"nvstore.dev/vpd/internal/table"
)

const (
	rtl8139ID = 0x8129
	phyWord   = 0x06 // of eepro100: the PHY's address and kind
)

// eepro100: the sum is in the last word, whether there are 64 or 256.
var eepro100 = &table.Layout{
	Name: "eepro100", Size: 128, Min: 128, Align: 2,
	Signature: []table.Patch{{Off: 2 * phyWord, Data: []byte{0x01, 0x00}}},
	Fields: []table.Field{
		{Name: "mac", Off: 0, Len: 6, Kind: table.MAC(), Required: true},
		wordField("compatibility", 0x03),
		wordField("controller", 0x05),
		wordField("phy", phyWord),
		wordField("phy_secondary", 0x07),
		{Name: "pba", Off: 2 * pbaWord, Len: 4, Kind: pbaKind(), Doc: "Printed board assembly number, such as 668081-001"},
		wordField("id", initWord),
		wordField("subsystem_id", 0x0b),
		wordField("subsystem_vendor_id", 0x0c),
	},
	Sums: []table.Sum{{Name: "checksum", Title: "checksum", Off: -2, Len: 2, From: 0, To: -2,
		Of: func(b []byte) uint64 { return uint64(intelSum - sumWords(b)) }}},
}

// rtl8139: the data sheet's "EEPROM (93C46) contents"; 93C56 are larger.
var rtl8139 = &table.Layout{
	Name: "rtl8139", Size: 128, Min: 128, Align: 2,
	Signature: []table.Patch{{Off: 0, Data: []byte{0x29, 0x81, 0xec, 0x10, 0x39, 0x81}}},
	Fields: []table.Field{
		wordField("id", 0),
		wordField("vendor_id", 1),
		wordField("device_id", 2),
		wordField("subsystem_vendor_id", 3),
		wordField("subsystem_id", 4),
		{Name: "min_gnt", Off: 10, Len: 1, Kind: table.Hex()},
		{Name: "max_lat", Off: 11, Len: 1, Kind: table.Hex()},
		{Name: "mac", Off: 14, Len: 6, Kind: table.MAC(), Required: true},
	},
}

// tulip: the ID block, and the first controller's entry behind it; its leaf,
// with the media, has no names here.
var tulip = &table.Layout{
	Name: "tulip", Size: 128, Min: 128, Align: 2,
	Signature: []table.Patch{{Off: 18, Data: []byte{0x04, 0x01}}, {Off: 27, Data: []byte{0x1e, 0x00}}},
	Fields: []table.Field{
		wordField("subsystem_vendor_id", 0),
		wordField("subsystem_id", 1),
		{Name: "cis_pointer", Off: 4, Len: 4, Kind: table.Hex(), Doc: "Of CardBus cards"},
		{Name: "hw_options", Off: 17, Len: 1, Kind: table.Hex()},
		{Name: "srom_version", Off: 18, Len: 1, Kind: table.Dec(), Doc: "Of the serial ROM format: 1 to 4"},
		{Name: "controllers", Off: 19, Len: 1, Kind: table.Dec(), Doc: "How many the card has"},
		{Name: "mac", Off: 20, Len: 6, Kind: table.MAC(), Required: true},
		{Name: "device_number", Off: 26, Len: 1, Kind: table.Dec(), Doc: "Of the first controller"},
		{Name: "leaf_offset", Off: 27, Len: 2, Kind: table.Hex(), Doc: "Of the first controller's media, in bytes"},
	},
	Sums: []table.Sum{
		{Name: "id_block_crc", Title: "CRC-8", Off: 16, Len: 1, From: 0, To: 18, Of: idBlockCRC},
		{Name: "checksum", Title: "CRC", Off: 126, Len: 2, From: 0, To: 126,
			Of: func(b []byte) uint64 { return uint64(crc32.ChecksumIEEE(b) & 0xffff) }},
	},
}

// idBlockCRC is x^8+x^2+x+1, beginning with ones, over words of which the
// upper half comes first; of the last word there is only that.
func idBlockCRC(b []byte) uint64 {
	crc := byte(0xff)
	for i := range 17 {
		n := i ^ 1
		crc ^= b[n]
		for range 8 {
			crc = crc<<1 ^ 7&-(crc>>7)
		}
	}
	return uint64(crc)
}

// pcnet: the address PROM, as a PC sees it at the card's I/O address.
var pcnet = &table.Layout{
	Name: "pcnet", Size: 16, Min: 16,
	Signature: []table.Patch{{Off: 9, Data: []byte{0x11}}, {Off: 14, Data: []byte("WW")}},
	Fields: []table.Field{
		{Name: "mac", Off: 0, Len: 6, Kind: table.MAC(), Required: true},
		{Name: "hardware_id", Off: 9, Len: 1, Kind: table.Hex(), Doc: "0x11 for AMD's drivers"},
		{Name: "user", Off: 10, Len: 2, Kind: table.Bytes(), Doc: "Of the user's"},
		{Name: "signature", Off: 14, Len: 2, Kind: table.Text(0)},
	},
	Sums: []table.Sum{{Name: "checksum", Title: "checksum", Off: 12, Len: 2, From: 0, To: 16, Of: func(b []byte) uint64 {
		var sum uint64
		for i, c := range b {
			if i != 12 && i != 13 {
				sum += uint64(c)
			}
		}
		return sum
	}}},
}
