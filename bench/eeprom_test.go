package bench

import (
	"errors"
	"fmt"
	"strconv"
	"testing"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/nvstore"
)

// chip is a 24C256 as a guest writes it: a page of 64 bytes, until the chip
// acknowledges again.
type chip struct {
	s *nvstore.Store
	c *i2c.Chip
}

func chipOn(k kind) opener {
	return func(dir string, _ *workload) (store, error) {
		part, err := i2c.Find("24C256")
		if err != nil {
			return nil, err
		}
		s, err := nvstore.Create(k.location(dir), k.options())
		if err != nil {
			return nil, err
		}
		mem, err := eeprom.Open(s, "i2c/8-0050/eeprom", part.Size, nil)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		c, err := i2c.New(part, mem, nil)
		return &chip{s, c}, err
	}
}

func (p *chip) put(key string, value []byte) error {
	i, err := strconv.Atoi(key[len("blob/"):])
	if err != nil {
		return err
	}
	if err := p.c.Start(0x50, false); err != nil {
		return err
	}
	at := i * int(p.c.Part().Size) / numKeys
	for _, b := range append([]byte{byte(at >> 8), byte(at)}, value...) {
		if err := p.c.WriteByte(b); err != nil {
			return err
		}
	}
	if err := p.c.Stop(); err != nil {
		return err
	}
	return p.c.Start(0x50, false)
}

func (p *chip) close() error { return p.s.Close() }

// eepromTable compares a page write of an emulated chip, until the guest sees
// that it is durable, with one of the same bytes to a file, and with one of the
// whole chip, which is what QEMU's at24c-eeprom writes at each stop condition;
// QEMU doesn't wait for the disk, so it is no subject itself.
func eepromTable(t *testing.T) {
	part, err := i2c.Find("24C256")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorkload(part.Page)
	list := []subject{
		w.subject(samePwrite, openPwrite),
		w.subject(samePwrite+" of the chip's 32 KiB", pwriteOf(int(part.Size), false)),
	}
	for _, k := range []kind{{onRaw, true}, {onRaw, false}, {onQCOW2, true}, {onQCOW2, false}} {
		list = append(list, w.subject("24C256, "+k.String(), chipOn(k)))
	}
	rows := measure(t, directory(t), list, scale(600, 10))
	show(timeTable(fmt.Sprintf("Durable write of a page of %d bytes of an I2C EEPROM", part.Page), rows))
}
