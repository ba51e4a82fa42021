package sfp

import (
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/internal/table"
)

const (
	a2 = 256 // offset of A2h

	offDiagnostics = 92
	bitDiagnostics = 0x40
)

// sff8472: tables 4-1 and 9-1 of SFF-8472, and its byte maps of A2h.
var sff8472 = &table.Layout{
	Name: "sff8472", Size: 256, Large: 512, Min: 96,
	Signature: []table.Patch{{Off: 0, Data: []byte{idSFP, 0x04}}},
	Fields: slices.Concat(
		[]table.Field{
			meaning(hexes("", 0, "identifier")[0], identifiers),
			hexes("", 1, "ext_identifier")[0],
			meaning(hexes("", 2, "connector")[0], connectors),
			{Name: "transceiver", Off: 3, Len: 8, Kind: table.Bytes(), Doc: "Compliance codes"},
			hexes("", 11, "encoding")[0],
		},
		counts(12, "br_nominal", "Of 100 MBd; 255 if br_max has it, of 250 MBd"),
		hexes("", 13, "rate_identifier"),
		counts(14, "length_smf_km", "Of single mode fiber", "length_smf_100m", "The same, of 100 m", "length_om2_10m", "Of 10 m",
			"length_om1_10m", "Of 10 m", "length_om4_10m", "Of 10 m; of copper, of 1 m", "length_om3_10m", "Of 10 m"),
		[]table.Field{text("vendor_name", 20, 16), hexes("", 36, "extended_compliance")[0], oui(37), text("vendor_pn", 40, 16), text("vendor_rev", 56, 4),
			{Name: "wavelength", Off: 60, Len: 2, Kind: table.DecBE(), Doc: "In nm; of a cable, which specification it complies with"}},
		hexes("", 62, "fibre_channel_speed_2"),
		[]table.Field{{Name: "options", Off: 64, Len: 2, Kind: table.HexBE()}},
		hexes("", 66, "br_max", "br_min"),
		[]table.Field{text("vendor_sn", 68, 16), dateCode(84)},
		hexes("", offDiagnostics, "diagnostic_monitoring", "enhanced_options", "sff8472_compliance"),

		thresholds("a2.", "temp", a2, celsius), thresholds("a2.", "vcc", a2+8, voltage), thresholds("a2.", "tx_bias", a2+16, current),
		thresholds("a2.", "tx_power", a2+24, power), thresholds("a2.", "rx_power", a2+32, power),
		thresholds("a2.", "laser_temp", a2+40, celsius), thresholds("a2.", "tec_current", a2+48, unitless),
		floats("a2.", a2+56, "rx_power_4", "rx_power_3", "rx_power_2", "rx_power_1", "rx_power_0"),
		values("a2.", a2+76, unitless, "tx_bias_slope", "tx_bias_offset", "tx_power_slope", "tx_power_offset",
			"temp_slope", "temp_offset", "vcc_slope", "vcc_offset"),
		values("a2.", a2+96, celsius, "temp"), values("a2.", a2+98, voltage, "vcc"), values("a2.", a2+100, current, "tx_bias"),
		values("a2.", a2+102, power, "tx_power", "rx_power"),
		hexes("a2.", a2+110, "status_control"),
		hexes("a2.", a2+127, "page_select"),
		[]table.Field{{Name: "a2.user", Off: a2 + 128, Len: 120, Kind: table.Bytes(), Doc: "The user's"}},
	),
	Sums: []table.Sum{checkCode("cc_base", 0, 63), checkCode("cc_ext", 64, 95), diagnosticsCode()},
}

// diagnosticsCode: a dump may have A2h of a module that has none.
func diagnosticsCode() table.Sum {
	s := checkCode("a2.cc_dmi", a2, a2+95)
	s.When = func(image []byte) bool { return len(image) > a2 && image[offDiagnostics]&bitDiagnostics != 0 }
	return s
}

// dateCode: table 8-8 of SFF-8472; SFF-8636, 6.3.25.
func dateCode(off int) table.Field {
	fd := text("date_code", off, 8)
	fd.Doc = "Of manufacturing: year, month and day in two digits each, and two characters for the lot"
	return fd
}

const (
	page0 = 128
	page3 = 512 // in the order in which ethtool dumps pages
)

// sff8636: the memory maps of SFF-8636, section 6.2 and 6.3; page 03h, 6.6.
var sff8636 = &table.Layout{
	Name: "sff8636", Size: 256, Large: 640, Min: 256,
	Signature: []table.Patch{{Off: 0, Data: []byte{idQSFP28}}, {Off: page0, Data: []byte{idQSFP28}}},
	Fields: slices.Concat(
		[]table.Field{
			meaning(hexes("", page0, "identifier")[0], identifiers),
			hexes("", 129, "ext_identifier")[0],
			meaning(hexes("", 130, "connector")[0], connectors),
			{Name: "transceiver", Off: 131, Len: 8, Kind: table.Bytes(), Doc: "Compliance codes"},
			hexes("", 139, "encoding")[0],
		},
		counts(140, "br_nominal", "Of 100 MBd; 255 if br_nominal_ext has it"),
		hexes("", 141, "rate_identifier"),
		counts(142, "length_smf_km", "Of single mode fiber", "length_om3_2m", "Of 2 m", "length_om2_m", "In m", "length_om1_m", "In m",
			"length_cable_m", "Of copper or active cable, in m; of OM4, of 2 m"),
		hexes("", 147, "device_technology"),
		[]table.Field{text("vendor_name", 148, 16), hexes("", 164, "extended_module_codes")[0], oui(165), text("vendor_pn", 168, 16), text("vendor_rev", 184, 2),
			{Name: "wavelength", Off: 186, Len: 2, Kind: table.DecBE(), Doc: "Of 0.05 nm; of copper cable, the attenuation"},
			{Name: "wavelength_tolerance", Off: 188, Len: 2, Kind: table.DecBE(), Doc: "Of 0.005 nm"}},
		counts(190, "max_case_temp", "In degrees Celsius; 0 for 70"),
		hexes("", 192, "link_codes", "options_1", "options_2", "options_3"),
		[]table.Field{text("vendor_sn", 196, 16), dateCode(212)},
		hexes("", 220, "diagnostic_monitoring", "enhanced_options"),
		counts(222, "br_nominal_ext", "Of 250 MBd"),

		[]table.Field{meaning(hexes("lower.", 0, "identifier")[0], identifiers)},
		hexes("lower.", 1, "revision_compliance", "status"),
		values("lower.", 22, celsius, "temp"), values("lower.", 26, voltage, "vcc"),
		values("lower.", 34, power, "rx1_power", "rx2_power", "rx3_power", "rx4_power"),
		values("lower.", 42, current, "tx1_bias", "tx2_bias", "tx3_bias", "tx4_bias"),
		values("lower.", 50, power, "tx1_power", "tx2_power", "tx3_power", "tx4_power"),
		hexes("lower.", 86, "tx_disable", "rx_rate_select", "tx_rate_select"),
		hexes("lower.", 93, "power_control"),
		hexes("lower.", 98, "cdr_control"),
		hexes("lower.", 127, "page_select"),

		thresholds("page3.", "temp", page3, celsius), thresholds("page3.", "vcc", page3+16, voltage),
		thresholds("page3.", "rx_power", page3+48, power), thresholds("page3.", "tx_bias", page3+56, current),
		thresholds("page3.", "tx_power", page3+64, power),
	),
	Sums:     []table.Sum{checkCode("cc_base", page0, 191), checkCode("cc_ext", 192, 223)},
	Complete: completeIdentifier,
	Check:    checkIdentifier,
}

// completeIdentifier: both pages begin with the identifier.
func completeIdentifier(image []byte, given func(string) bool) {
	if given("identifier") && !given("lower.identifier") {
		image[0] = image[page0]
	}
}

func checkIdentifier(image []byte) []vpd.Problem {
	if image[0] == image[page0] {
		return nil
	}
	return []vpd.Problem{{Area: "lower.identifier", Off: 0, Msg: "is not the identifier of page 00h", Got: spec.Byte(image[0]), Want: spec.Byte(image[page0])}}
}
