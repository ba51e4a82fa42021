package spd

import (
	"slices"

	"nvstore.dev/vpd/internal/table"
)

// head is the first four bytes: what they mean differs, where they are does
// not.
func head(modules map[byte]string) []table.Field {
	list := hexes(offBytes, "bytes_used", "spd_revision", "memory_type", "module_type")
	list[offType].Meaning = func(b []byte) string {
		return map[byte]string{typeDDR3: "DDR3", typeDDR4: "DDR4", typeDDR5: "DDR5"}[b[0]]
	}
	list[offModule].Meaning = func(b []byte) string { return modules[b[0]&0x0f] }
	return list
}

// first4 is what a spec's layout says of them by itself.
func first4(used, revision, memory, module byte) []table.Patch {
	return []table.Patch{{Off: 0, Data: []byte{used, revision, memory, module}}}
}

var ddr3 = &table.Layout{
	Name: "ddr3", Size: 256, Min: 128,
	Signature: first4(0x92, 0x11, typeDDR3, 0x02),
	Fields: slices.Concat(
		head(map[byte]string{1: "RDIMM", 2: "UDIMM", 3: "SO-DIMM", 4: "Micro-DIMM", 5: "Mini-RDIMM", 6: "Mini-UDIMM", 7: "Mini-CDIMM",
			8: "72b-SO-UDIMM", 9: "72b-SO-RDIMM", 10: "72b-SO-CDIMM", 11: "LRDIMM"}),
		hexes(4, "density_banks", "addressing", "nominal_voltage", "organization", "bus_width", "fine_timebase",
			"medium_timebase_dividend", "medium_timebase_divisor", "tck_min", "", "cas_latencies_low", "cas_latencies_high",
			"taa_min", "twr_min", "trcd_min", "trrd_min", "trp_min", "tras_trc_upper", "tras_min", "trc_min"),
		words(24, "trfc_min"),
		hexes(26, "twtr_min", "trtp_min", "tfaw_upper", "tfaw_min", "optional_features", "thermal_refresh_options", "thermal_sensor",
			"device_type", "tck_min_fine", "taa_min_fine", "trcd_min_fine", "trp_min_fine", "trc_min_fine"),
		hexes(60, "module_height", "module_thickness", "reference_raw_card"),
		identity(117, 128, 18, 2),
	),
	Sums: []table.Sum{{Name: "crc", Title: "CRC-16", Off: 126, Len: 2, Of: crc16, Span: func(image []byte) (int, int) {
		if image[offBytes]&0x80 != 0 {
			return 0, 117 // without serial number and date
		}
		return 0, 126
	}}},
}

var ddr4Base = slices.Concat(
	head(map[byte]string{0: "extended", 1: "RDIMM", 2: "UDIMM", 3: "SO-DIMM", 4: "LRDIMM", 5: "Mini-RDIMM", 6: "Mini-UDIMM",
		8: "72b-SO-RDIMM", 9: "72b-SO-UDIMM", moduleDDIMM: "DDIMM", 12: "16b-SO-DIMM", 13: "32b-SO-DIMM"}),
	hexes(4, "density_banks", "addressing", "primary_package", "optional_features", "thermal_refresh_options", "other_features",
		"secondary_package", "nominal_voltage", "organization", "bus_width", "thermal_sensor", "extended_module_type", "", "timebases",
		"tckavg_min", "tckavg_max"),
	[]table.Field{{Name: "cas_latencies", Off: 20, Len: 4, Kind: table.Hex()}},
	hexes(24, "taa_min", "trcd_min", "trp_min", "tras_trc_upper", "tras_min", "trc_min"),
	words(30, "trfc1_min", "trfc2_min", "trfc4_min"),
	hexes(36, "tfaw_upper", "tfaw_min", "trrd_s_min", "trrd_l_min", "tccd_l_min", "twr_upper", "twr_min", "twtr_upper", "twtr_s_min", "twtr_l_min"),
	[]table.Field{{Name: "bit_mapping", Off: 60, Len: 18, Kind: table.Bytes(), Doc: "From the connector to the SDRAMs"}},
	hexes(117, "tccd_l_min_fine", "trrd_l_min_fine", "trrd_s_min_fine", "trc_min_fine", "trp_min_fine", "trcd_min_fine", "taa_min_fine",
		"tckavg_max_fine", "tckavg_min_fine"),
)

var ddr4 = &table.Layout{
	Name: "ddr4", Size: 512, Min: 128,
	Signature: first4(0x23, 0x11, typeDDR4, 0x02),
	Fields: slices.Concat(ddr4Base,
		hexes(128, "module_height", "module_thickness", "reference_raw_card"),
		identity(320, 329, 20, 1),
		hexes(352, "dram_stepping")),
	Sums: []table.Sum{crc("crc", 0, 126), crc("module_crc", 128, 254)},
}

var ddr5Base = slices.Concat(
	head(map[byte]string{1: "RDIMM", 2: "UDIMM", 3: "SODIMM", 4: "LRDIMM", 5: "CUDIMM", 6: "CSODIMM", 7: "MRDIMM", 8: "CAMM2",
		moduleDDIMM: "DDIMM", 11: "soldered down"}),
	hexes(4, "first_density_package", "first_addressing", "first_io_width", "first_bank_groups",
		"second_density_package", "second_addressing", "second_io_width", "second_bank_groups",
		"post_package_repair", "duty_cycle_adjuster", "fault_handling", "", "vdd", "vddq", "vpp", "timing"),
	words(20, "tckavg_min_ps", "tckavg_max_ps"),
	[]table.Field{{Name: "cas_latencies", Off: 24, Len: 5, Kind: table.Bytes()}},
	words(30, "taa_min_ps", "trcd_min_ps", "trp_min_ps", "tras_min_ps", "trc_min_ps", "twr_min_ps", "trfc1_min_ns", "trfc2_min_ns", "trfcsb_min_ns"),
)

var ddr5 = &table.Layout{
	Name: "ddr5", Size: 1024, Min: 512,
	Signature: first4(0x30, 0x10, typeDDR5, 0x02),
	Fields: slices.Concat(ddr5Base,
		hexes(192, "module_revision"),
		[]table.Field{
			{Name: "spd_manufacturer", Off: 194, Len: 2, Kind: idKind(), Meaning: maker},
			hex1("spd_device_type", 196), hex1("spd_device_revision", 197),
			{Name: "pmic0_manufacturer", Off: 198, Len: 2, Kind: idKind(), Meaning: maker},
			hex1("pmic0_device_type", 200), hex1("pmic0_revision", 201),
			{Name: "thermal_sensor_manufacturer", Off: 210, Len: 2, Kind: idKind(), Meaning: maker},
			hex1("thermal_sensor_type", 212), hex1("thermal_sensor_revision", 213),
		},
		hexes(230, "module_height", "module_thickness", "reference_raw_card", "dimm_attributes", "organization", "bus_width"),
		identity(512, 521, 30, 1),
		hexes(554, "dram_stepping")),
	Sums: []table.Sum{crc("crc", 0, 510)},
}

// barcode is IBM's part and serial number, as on the label.
var barcode = table.Field{Name: "barcode", Off: 416, Len: 26, Kind: table.Text(0), Doc: "IBM's: 11S, part number and serial number"}

// ddimmIdentity: as DDR5 has it, but the serial number begins where the date
// would be, and is text.
var ddimmIdentity = []table.Field{
	barcode,
	{Name: "module_manufacturer", Off: 512, Len: 2, Kind: idKind(), Meaning: maker, Doc: "Code of JEP106, such as 0x0194"},
	hex1("location", 514),
	{Name: "serial_number", Off: 515, Len: 6, Kind: table.Text(' ')},
	{Name: "part_number", Off: 521, Len: 30, Kind: table.Text(' ')},
	hex1("revision", 551),
	{Name: "dram_manufacturer", Off: 552, Len: 2, Kind: idKind(), Meaning: maker, Doc: "Code of JEP106, such as 0x80ad"},
	hex1("dram_stepping", 554),
}

var ddr4DDIMM = &table.Layout{
	Name: "ddr4-ddimm", Size: 4096, Min: 640,
	Signature: first4(0x00, 0x04, typeDDR4, moduleDDIMM),
	Fields:    slices.Concat(ddr4Base, ddimmIdentity),
	Sums:      []table.Sum{crc("crc", 0, 126), crc("module_crc", 192, 446)},
}

var ddr5DDIMM = &table.Layout{
	Name: "ddr5-ddimm", Size: 4096, Min: 640,
	Signature: first4(0x00, 0x06, typeDDR5, moduleDDIMM),
	Fields:    slices.Concat(ddr5Base, ddimmIdentity),
	Sums:      []table.Sum{crc("crc", 0, 126), crc("module_crc", 192, 446), crc("manufacturing_crc", 512, 638)},
}
