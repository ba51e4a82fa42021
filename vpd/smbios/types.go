package smbios

// A kind is how a field's bytes are read.
type kind int

const (
	number kind = iota
	hexNumber
	text // the number of a string
	uuid
	octets
)

// A field of a structure: DSP0134, chapter 7.
type field struct {
	name string
	off  int
	size int
	kind kind
}

// A definition is a type of structure. Its lengths are those of the versions
// that added fields.
type definition struct {
	typ     byte
	name    string
	lengths []length
	fields  []field
}

type length struct {
	version int // major<<8 | minor
	bytes   int
}

const (
	typeOEMStrings = 11
	typeOptions    = 12
	typeChassis    = 3
	typeEnd        = 127
)

var definitions = []definition{
	{0, "bios", []length{{0x200, 0x12}, {0x204, 0x18}, {0x301, 0x1a}}, []field{
		{"vendor", 0x04, 1, text}, {"version", 0x05, 1, text}, {"start_segment", 0x06, 2, hexNumber}, {"release_date", 0x08, 1, text},
		{"rom_size", 0x09, 1, number}, {"characteristics", 0x0a, 8, hexNumber}, {"characteristics_ext1", 0x12, 1, hexNumber},
		{"characteristics_ext2", 0x13, 1, hexNumber}, {"bios_major", 0x14, 1, number}, {"bios_minor", 0x15, 1, number},
		{"ec_major", 0x16, 1, number}, {"ec_minor", 0x17, 1, number}, {"extended_rom_size", 0x18, 2, number}}},
	{1, "system", []length{{0x200, 0x08}, {0x201, 0x19}, {0x204, 0x1b}}, []field{
		{"manufacturer", 0x04, 1, text}, {"product_name", 0x05, 1, text}, {"version", 0x06, 1, text}, {"serial_number", 0x07, 1, text},
		{"uuid", 0x08, 16, uuid}, {"wake_up_type", 0x18, 1, number}, {"sku_number", 0x19, 1, text}, {"family", 0x1a, 1, text}}},
	{2, "baseboard", []length{{0x200, 0x0f}}, []field{
		{"manufacturer", 0x04, 1, text}, {"product_name", 0x05, 1, text}, {"version", 0x06, 1, text}, {"serial_number", 0x07, 1, text},
		{"asset_tag", 0x08, 1, text}, {"feature_flags", 0x09, 1, hexNumber}, {"location_in_chassis", 0x0a, 1, text},
		{"chassis_handle", 0x0b, 2, hexNumber}, {"board_type", 0x0d, 1, number}, {"contained_count", 0x0e, 1, number}}},
	{typeChassis, "chassis", []length{{0x200, 0x09}, {0x201, 0x0d}, {0x203, 0x15}, {0x207, 0x16}}, []field{
		{"manufacturer", 0x04, 1, text}, {"chassis_type", 0x05, 1, number}, {"version", 0x06, 1, text}, {"serial_number", 0x07, 1, text},
		{"asset_tag", 0x08, 1, text}, {"boot_up_state", 0x09, 1, number}, {"power_supply_state", 0x0a, 1, number},
		{"thermal_state", 0x0b, 1, number}, {"security_status", 0x0c, 1, number}, {"oem_defined", 0x0d, 4, hexNumber},
		{"height", 0x11, 1, number}, {"power_cords", 0x12, 1, number}, {"contained_count", 0x13, 1, number},
		{"contained_length", 0x14, 1, number}, {"sku_number", 0x15, 1, text}}},
	{4, "processor", []length{{0x200, 0x1a}, {0x201, 0x20}, {0x203, 0x23}, {0x205, 0x28}, {0x206, 0x2a}, {0x300, 0x30}, {0x306, 0x32}}, []field{
		{"socket", 0x04, 1, text}, {"processor_type", 0x05, 1, number}, {"family", 0x06, 1, number}, {"manufacturer", 0x07, 1, text},
		{"id", 0x08, 8, hexNumber}, {"version", 0x10, 1, text}, {"voltage", 0x11, 1, number}, {"external_clock", 0x12, 2, number},
		{"max_speed", 0x14, 2, number}, {"current_speed", 0x16, 2, number}, {"status", 0x18, 1, hexNumber}, {"upgrade", 0x19, 1, number},
		{"l1_cache_handle", 0x1a, 2, hexNumber}, {"l2_cache_handle", 0x1c, 2, hexNumber}, {"l3_cache_handle", 0x1e, 2, hexNumber},
		{"serial_number", 0x20, 1, text}, {"asset_tag", 0x21, 1, text}, {"part_number", 0x22, 1, text}, {"core_count", 0x23, 1, number},
		{"core_enabled", 0x24, 1, number}, {"thread_count", 0x25, 1, number}, {"characteristics", 0x26, 2, hexNumber},
		{"family2", 0x28, 2, number}, {"core_count2", 0x2a, 2, number}, {"core_enabled2", 0x2c, 2, number},
		{"thread_count2", 0x2e, 2, number}, {"thread_enabled", 0x30, 2, number}}},
	{7, "cache", []length{{0x200, 0x0f}, {0x201, 0x13}, {0x301, 0x1b}}, []field{
		{"socket", 0x04, 1, text}, {"configuration", 0x05, 2, hexNumber}, {"maximum_size", 0x07, 2, number}, {"installed_size", 0x09, 2, number},
		{"supported_sram", 0x0b, 2, hexNumber}, {"current_sram", 0x0d, 2, hexNumber}, {"speed", 0x0f, 1, number},
		{"error_correction", 0x10, 1, number}, {"system_cache_type", 0x11, 1, number}, {"associativity", 0x12, 1, number},
		{"maximum_size2", 0x13, 4, number}, {"installed_size2", 0x17, 4, number}}},
	{8, "port", []length{{0x200, 0x09}}, []field{
		{"internal_designator", 0x04, 1, text}, {"internal_connector", 0x05, 1, number}, {"external_designator", 0x06, 1, text},
		{"external_connector", 0x07, 1, number}, {"port_type", 0x08, 1, number}}},
	{9, "slot", []length{{0x200, 0x0c}, {0x201, 0x0d}, {0x206, 0x11}}, []field{
		{"designation", 0x04, 1, text}, {"slot_type", 0x05, 1, number}, {"bus_width", 0x06, 1, number}, {"usage", 0x07, 1, number},
		{"slot_length", 0x08, 1, number}, {"id", 0x09, 2, number}, {"characteristics1", 0x0b, 1, hexNumber}, {"characteristics2", 0x0c, 1, hexNumber},
		{"segment", 0x0d, 2, number}, {"bus", 0x0f, 1, number}, {"device_function", 0x10, 1, hexNumber}}},
	{typeOEMStrings, "oem_strings", []length{{0x200, 0x05}}, []field{{"count", 0x04, 1, number}}},
	{typeOptions, "options", []length{{0x200, 0x05}}, []field{{"count", 0x04, 1, number}}},
	{16, "memory_array", []length{{0x201, 0x0f}, {0x207, 0x17}}, []field{
		{"location", 0x04, 1, number}, {"use", 0x05, 1, number}, {"error_correction", 0x06, 1, number}, {"maximum_capacity", 0x07, 4, hexNumber},
		{"error_handle", 0x0b, 2, hexNumber}, {"device_count", 0x0d, 2, number}, {"extended_maximum_capacity", 0x0f, 8, hexNumber}}},
	{17, "memory_device", []length{{0x201, 0x15}, {0x203, 0x1b}, {0x206, 0x1c}, {0x207, 0x22}, {0x208, 0x28}, {0x302, 0x54}, {0x303, 0x5c}, {0x307, 0x64}}, []field{
		{"array_handle", 0x04, 2, hexNumber}, {"error_handle", 0x06, 2, hexNumber}, {"total_width", 0x08, 2, number}, {"data_width", 0x0a, 2, number},
		{"module_size", 0x0c, 2, hexNumber}, {"form_factor", 0x0e, 1, number}, {"device_set", 0x0f, 1, number}, {"device_locator", 0x10, 1, text},
		{"bank_locator", 0x11, 1, text}, {"memory_type", 0x12, 1, number}, {"type_detail", 0x13, 2, hexNumber}, {"speed", 0x15, 2, number},
		{"manufacturer", 0x17, 1, text}, {"serial_number", 0x18, 1, text}, {"asset_tag", 0x19, 1, text}, {"part_number", 0x1a, 1, text},
		{"attributes", 0x1b, 1, hexNumber}, {"extended_size", 0x1c, 4, number}, {"configured_speed", 0x20, 2, number},
		{"minimum_voltage", 0x22, 2, number}, {"maximum_voltage", 0x24, 2, number}, {"configured_voltage", 0x26, 2, number},
		{"memory_technology", 0x28, 1, number}, {"operating_modes", 0x29, 2, hexNumber}, {"firmware_version", 0x2b, 1, text},
		{"module_manufacturer_id", 0x2c, 2, hexNumber}, {"module_product_id", 0x2e, 2, hexNumber}, {"controller_manufacturer_id", 0x30, 2, hexNumber},
		{"controller_product_id", 0x32, 2, hexNumber}, {"non_volatile_size", 0x34, 8, hexNumber}, {"volatile_size", 0x3c, 8, hexNumber},
		{"cache_size", 0x44, 8, hexNumber}, {"logical_size", 0x4c, 8, hexNumber}, {"extended_speed", 0x54, 4, number},
		{"extended_configured_speed", 0x58, 4, number}, {"pmic0_manufacturer_id", 0x5c, 2, hexNumber}, {"pmic0_revision", 0x5e, 2, hexNumber},
		{"rcd_manufacturer_id", 0x60, 2, hexNumber}, {"rcd_revision", 0x62, 2, hexNumber}}},
	{19, "memory_array_address", []length{{0x201, 0x0f}, {0x207, 0x1f}}, []field{
		{"starting_address", 0x04, 4, hexNumber}, {"ending_address", 0x08, 4, hexNumber}, {"array_handle", 0x0c, 2, hexNumber},
		{"partition_width", 0x0e, 1, number}, {"extended_starting_address", 0x0f, 8, hexNumber}, {"extended_ending_address", 0x17, 8, hexNumber}}},
	{32, "boot", []length{{0x203, 0x0b}}, []field{{"reserved", 0x04, 6, octets}, {"boot_status", 0x0a, 1, number}}},
	{38, "ipmi", []length{{0x203, 0x12}}, []field{
		{"interface_type", 0x04, 1, number}, {"revision", 0x05, 1, hexNumber}, {"i2c_address", 0x06, 1, hexNumber}, {"nv_address", 0x07, 1, hexNumber},
		{"base_address", 0x08, 8, hexNumber}, {"modifier", 0x10, 1, hexNumber}, {"interrupt", 0x11, 1, number}}},
	{41, "onboard_device", []length{{0x206, 0x0b}}, []field{
		{"designation", 0x04, 1, text}, {"device_type", 0x05, 1, hexNumber}, {"instance", 0x06, 1, number}, {"segment", 0x07, 2, number},
		{"bus", 0x09, 1, number}, {"device_function", 0x0a, 1, hexNumber}}},
	{43, "tpm", []length{{0x301, 0x1f}}, []field{
		{"vendor_id", 0x04, 4, octets}, {"spec_major", 0x08, 1, number}, {"spec_minor", 0x09, 1, number}, {"firmware_version1", 0x0a, 4, hexNumber},
		{"firmware_version2", 0x0e, 4, hexNumber}, {"description", 0x12, 1, text}, {"characteristics", 0x13, 8, hexNumber}, {"oem_defined", 0x1b, 4, hexNumber}}},
	{typeEnd, "end", []length{{0x202, 0x04}}, nil},
}

func byType(typ byte) *definition {
	for i := range definitions {
		if definitions[i].typ == typ {
			return &definitions[i]
		}
	}
	return nil
}

func byName(name string) *definition {
	for i := range definitions {
		if definitions[i].name == name {
			return &definitions[i]
		}
	}
	return nil
}

// least is the shortest that a structure may be.
func (d *definition) least() int { return d.lengths[0].bytes }

// length is what a structure has in a version.
func (d *definition) length(version int) int {
	n := d.least()
	for _, l := range d.lengths {
		if l.version <= version {
			n = l.bytes
		}
	}
	return n
}

// listed: the strings are the content, and no field refers to them.
func (d *definition) listed() bool { return d.typ == typeOEMStrings || d.typ == typeOptions }

// known are the fields of which the place is known: a chassis has elements in
// front of its last.
func (d *definition) known(formatted []byte) []field {
	if d.typ == typeChassis && len(formatted) > 0x14 && int(formatted[0x13])*int(formatted[0x14]) != 0 {
		return d.fields[:len(d.fields)-1]
	}
	return d.fields
}
