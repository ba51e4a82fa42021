package qtest

// The flash controllers of ASPEED's AST2600 have a control register for each
// chip select; in user mode, what is written to the chip's window in memory goes
// out on the bus, and reading it takes bytes.
const (
	spiControl  = 0x10
	spiConfig   = 0x00
	spiUserMode = 3
	spiInactive = 1 << 2 // CS is high
	spiWritable = 1 << 16
)

// AspeedSPI is chip select 0 of one of an AST2600's flash controllers.
type AspeedSPI struct {
	m         *Machine
	registers uint64
	window    uint64
}

// AspeedFMC returns the firmware's flash controller, of which the chip is
// QEMU's fmc-model.
func (m *Machine) AspeedFMC() (*AspeedSPI, error) { return m.aspeedSPI(0x1e620000, 0x20000000) }

// AspeedSPI1 returns the first of the others, whose chip is QEMU's spi-model.
func (m *Machine) AspeedSPI1() (*AspeedSPI, error) { return m.aspeedSPI(0x1e630000, 0x30000000) }

func (m *Machine) aspeedSPI(registers, window uint64) (*AspeedSPI, error) {
	s := &AspeedSPI{m, registers, window}
	config, err := m.Read(32, registers+spiConfig)
	if err != nil {
		return nil, err
	}
	if err := m.Write(32, registers+spiConfig, config|spiWritable); err != nil {
		return nil, err
	}
	return s, s.level(false)
}

func (s *AspeedSPI) level(selected bool) error {
	v := uint64(spiUserMode)
	if !selected {
		v |= spiInactive
	}
	return s.m.Write(32, s.registers+spiControl, v)
}

// Transfer sends bytes and takes n more, between the edges of CS.
func (s *AspeedSPI) Transfer(out []byte, n int) ([]byte, error) {
	if err := s.level(true); err != nil {
		return nil, err
	}
	for _, b := range out {
		if err := s.m.Write(8, s.window, uint64(b)); err != nil {
			return nil, err
		}
	}
	in := make([]byte, n)
	for i := range in {
		v, err := s.m.Read(8, s.window)
		if err != nil {
			return nil, err
		}
		in[i] = byte(v)
	}
	return in, s.level(false)
}
