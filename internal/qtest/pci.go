package qtest

import "fmt"

// Ports of PCI configuration mechanism 1 (PCI Local Bus Specification 3.0,
// section 3.2.2.3.2).
const (
	configAddress = 0xcf8
	configData    = 0xcfc
)

// A PCIDevice is a function on bus 0 of an x86 machine.
type PCIDevice struct {
	m    *Machine
	base uint64
}

// PCI returns the function at a slot of bus 0; it may not be there.
func (m *Machine) PCI(slot, function int) *PCIDevice {
	return &PCIDevice{m, 1<<31 | uint64(slot)<<11 | uint64(function)<<8}
}

// Config reads 32 bits of configuration space.
func (d *PCIDevice) Config(off uint8) (uint32, error) {
	if err := d.m.Out(32, configAddress, d.base|uint64(off&^3)); err != nil {
		return 0, err
	}
	v, err := d.m.In(32, configData)
	return uint32(v), err
}

// SetConfig writes 32 bits of configuration space.
func (d *PCIDevice) SetConfig(off uint8, v uint32) error {
	if err := d.m.Out(32, configAddress, d.base|uint64(off&^3)); err != nil {
		return err
	}
	return d.m.Out(32, configData, uint64(v))
}

// Map gives the function's BAR an address, and has it decode memory and ports,
// and be bus master. Of a 64-bit BAR it sets the lower half.
func (d *PCIDevice) Map(bar int, addr uint32) error {
	id, err := d.Config(0)
	if err != nil {
		return err
	}
	if id == 0xffffffff {
		return fmt.Errorf("no PCI function answers at %#x", d.base)
	}
	if err := d.SetConfig(uint8(0x10+4*bar), addr); err != nil {
		return err
	}
	command, err := d.Config(0x04)
	if err != nil {
		return err
	}
	return d.SetConfig(0x04, command&0xffff|7)
}
