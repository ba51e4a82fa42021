// Package idprom packs and parses the ID PROM of Sun's SPARC machines: who the
// machine is, at 0x1fd8 of its NVRAM, or in a PROM of its own (struct idprom
// in arch/sparc/include/asm/idprom.h of Linux).
//
//	+-----------+-----------+---------+---------+-----------------+-------+------------+
//	| version 8 | machine 8 | MAC 48  | date 32 | serial number 24 | XOR 8 | reserved 128 |
//	+-----------+-----------+---------+---------+-----------------+-------+------------+
//
// Numbers are big-endian. The XOR of the first 16 bytes is zero.
//
// The spec:
//
//	{
//	  "format": "idprom",
//	  "machine": "0x80",                // 0x72 SPARCstation 10 and 20, 0x80 SPARCstation 5
//	  "mac": "08:00:20:12:34:56",
//	  "date": 0,                        // of manufacturing, in seconds since 1970
//	  "serial_number": "0x123456"       // with the machine's code, the host ID
//	}
package idprom

import (
	"errors"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/internal/table"
)

// Name is the format's name in a spec.
const Name = "idprom"

// MaxSize is the most bytes an image may have.
const MaxSize = 4096

const (
	version    = 1
	size       = 32
	offSum     = 15
	offReserve = 16
)

// machines are the codes that Linux knows.
var machines = map[byte]string{
	0x51: "SPARCstation 1", 0x52: "SPARCstation IPC", 0x53: "SPARCstation 1+", 0x54: "SPARCstation SLC", 0x55: "SPARCstation 2",
	0x56: "SPARCstation ELC", 0x57: "SPARCstation IPX", 0x71: "SPARCserver 600MP", 0x72: "SPARCstation 10 or 20", 0x80: "SPARCstation 5 or newer",
}

var layout = &table.Layout{
	Size: size, Min: offSum + 1,
	Signature: []table.Patch{{Off: 0, Data: []byte{version}}},
	Fields: []table.Field{
		{Name: "version", Off: 0, Len: 1, Kind: table.Dec(), Doc: "1"},
		{Name: "machine", Off: 1, Len: 1, Kind: table.Hex(), Required: true, Meaning: func(b []byte) string { return machines[b[0]] }},
		{Name: "mac", Off: 2, Len: 6, Kind: table.MAC(), Required: true},
		{Name: "date", Off: 8, Len: 4, Kind: table.DecBE(), Doc: "Of manufacturing, in seconds since 1970"},
		{Name: "serial_number", Off: 12, Len: 3, Kind: table.HexBE(), Doc: "With the machine's code, the host ID"},
	},
	Sums: []table.Sum{{Name: "checksum", Title: "checksum", Off: offSum, Len: 1, From: 0, To: offSum, Of: func(b []byte) (sum uint64) {
		for _, c := range b {
			sum ^= uint64(c)
		}
		return sum
	}}},
	Check: check,
}

var format = table.New(table.Def{
	Name: Name, Title: "Sun ID PROM", MaxSize: MaxSize, Layouts: []*table.Layout{layout},
	Pick: func(image []byte) (*table.Layout, error) {
		if len(image) == 0 {
			return nil, errors.New("is empty")
		}
		return layout, nil
	},
	Plain: plain,
})

// Format returns the format.
func Format() vpd.Format { return format }

// plain: a checksum of eight bits is little, so nothing else may be unusual.
func plain(l *table.Layout, image []byte, wrong int) bool {
	return wrong == 0 && image[0] == version && l.Has(image, "mac") && machines[image[1]] != "" && len(image) == size && table.Blank(image[offReserve:])
}

func check(image []byte) []vpd.Problem {
	if image[0] == version {
		return nil
	}
	return []vpd.Problem{{Area: "version", Off: 0, Msg: "is not known", Got: spec.Byte(image[0]), Want: spec.Byte(version)}}
}
