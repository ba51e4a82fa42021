package machine

import "fmt"

const kib = 1 << 10

// machines are QEMU's boards, with the EEPROMs that hw/arm/aspeed.c and
// hw/arm/npcm7xx_boards.c of QEMU 9.2 give them. Where QEMU has an
// smbus-eeprom, it uses 256 bytes of it.
var machines = []Template{
	{Name: "palmetto-bmc", About: "OpenPOWER Palmetto BMC", rooms: []room{{"0-0050", 256, "Palmetto"}}},
	{Name: "supermicrox11-bmc", About: "Supermicro X11 BMC", rooms: []room{{"0-0050", 256, "X11"}}},
	{Name: "supermicro-x11spi-bmc", About: "Supermicro X11 SPI BMC", rooms: []room{{"0-0050", 256, "X11 SPI"}}},
	{Name: "ast1030-evb", About: "Aspeed AST1030 MiniBMC", rooms: []room{{"0-0050", 256, "AST1030 EVB"}}},
	{Name: "ast2500-evb", About: "Aspeed AST2500 EVB", rooms: []room{{"3-0050", 256, "AST2500 EVB"}}},
	{Name: "ast2600-evb", About: "Aspeed AST2600 EVB", rooms: []room{{"7-0050", 256, "AST2600 EVB"}}},
	{Name: "sonorapass-bmc", About: "OCP SonoraPass BMC", rooms: []room{{"4-0054", 256, "Baseboard"}, {"8-0056", 256, ""}}},
	{Name: "witherspoon-bmc", About: "OpenPOWER Witherspoon BMC", rooms: []room{{"11-0051", 256, "Witherspoon"}}},
	{Name: "tacoma-bmc", About: "OpenPOWER Tacoma BMC", rooms: []room{{"11-0051", 256, "Tacoma"}}},
	{Name: "g220a-bmc", About: "Bytedance G220A BMC", rooms: []room{{"4-0057", 256, "G220A"}}},
	{Name: "fp5280g2-bmc", About: "Inspur FP5280G2 BMC", rooms: []room{{"1-0050", 32 * kib, "FP5280G2"}}},
	{Name: "yosemitev2-bmc", About: "Facebook YosemiteV2 BMC", rooms: []room{
		{"4-0051", 128 * kib, ""}, {"8-0051", 128 * kib, "Baseboard"},
	}},
	{Name: "tiogapass-bmc", About: "Facebook Tiogapass BMC", rooms: []room{
		{"4-0054", 128 * kib, ""}, {"6-0054", 128 * kib, "Baseboard"},
	}},
	{Name: "fby35-bmc", About: "Facebook fby35 BMC", rooms: []room{
		{"4-0051", 128 * kib, ""}, {"6-0051", 128 * kib, ""},
		{"8-0050", 32 * kib, "NIC"}, {"11-0051", 128 * kib, "Baseboard"}, {"11-0054", 128 * kib, "BMC"},
	}},
	{Name: "bletchley-bmc", About: "Facebook Bletchley BMC", rooms: []room{
		{"6-0056", 64 * kib, "Baseboard"}, {"7-0054", 64 * kib, ""},
	}},
	{Name: "fuji-bmc", About: "Facebook Fuji BMC", rooms: fuji()},
	{Name: "rainier-bmc", About: "IBM Rainier BMC", rooms: []room{
		{"0-0051", 32 * kib, ""},
		{"4-0070/0-0050", 64 * kib, ""}, {"4-0070/1-0051", 64 * kib, ""}, {"4-0070/2-0052", 64 * kib, ""},
		{"5-0070/0-0050", 64 * kib, ""}, {"5-0070/1-0051", 64 * kib, ""},
		{"6-0070/0-0050", 64 * kib, ""}, {"6-0070/1-0051", 64 * kib, ""}, {"6-0070/2-0050", 64 * kib, ""}, {"6-0070/3-0051", 64 * kib, ""},
		{"7-0050", 64 * kib, ""}, {"7-0051", 64 * kib, ""},
		// OpenPOWER VPD, whose ECC isn't public: blank here, from a file
		// if you have one.
		{"8-0050", 64 * kib, ""}, {"8-0051", 64 * kib, ""},
		{"9-0050", 128 * kib, ""}, {"10-0050", 128 * kib, ""},
		{"11-0070/0-0050", 64 * kib, ""}, {"11-0070/1-0051", 64 * kib, ""},
		{"13-0050", 64 * kib, ""}, {"14-0050", 64 * kib, ""}, {"15-0050", 64 * kib, ""},
	}},
	{Name: "quanta-gsj", About: "Quanta GSJ", rooms: []room{{"9-0055", 8 * kib, "Baseboard"}, {"10-0055", 8 * kib, ""}}},
	{Name: "kudo-bmc", About: "Kudo BMC", rooms: []room{{"4-0050", 8 * kib, "Baseboard"}, {"14-0055", 8 * kib, "BMC"}}},
	{Name: "pc", About: "x86 PC with its default network card", layers: []string{`"net0/nvm": {"template": "e1000"}`}},
	{Name: "q35", About: "x86 Q35 PC with its default network card", layers: []string{`"net0/nvm": {"template": "e1000e"}`}},
}

// fuji's EEPROMs lie behind multiplexers: of 8 channels each, at 2-0070,
// 8-0070 and 11-0077, and behind these.
func fuji() []room {
	list := []room{
		{"2-0070/3-0052", 8 * kib, "SCM"}, {"2-0070/4-0050", 256, ""}, {"2-0070/6-0052", 256, ""},
		{"8-0051", 8 * kib, "SMB"}, {"8-0070/0-0071/2-0052", 8 * kib, "Switch"}, {"8-0070/4-0050", 256, ""},
	}
	// Channels 2 and 3 of 8-0070 lead to the left and right fan boards.
	for side := 2; side <= 3; side++ {
		mux := fmt.Sprintf("8-0070/%d-0076/", side)
		list = append(list, room{mux + "1-0053", 8 * kib, "Fan board"})
		for channel := 4; channel < 8; channel++ {
			list = append(list, room{fmt.Sprintf("%s%d-0052", mux, channel), 8 * kib, "Fan"})
		}
	}
	for slot := range 8 {
		list = append(list, room{fmt.Sprintf("11-0077/%d-0076/1-0056", slot), 64 * kib, "PIM"})
	}
	return list
}
