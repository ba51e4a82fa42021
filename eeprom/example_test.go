package eeprom_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/nvstore"
)

// An EEPROM of 256 bytes on an I2C bus. What the guest has seen complete is in
// the image, also if the power fails at this instant.
func Example() {
	dir, err := os.MkdirTemp("", "eeprom")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s, err := nvstore.Create(filepath.Join(dir, "vm.qcow2"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()

	part, err := i2c.Find("24C02")
	if err != nil {
		log.Fatal(err)
	}
	memory, err := eeprom.Open(s, "i2c/8-0050/eeprom", part.Size, nil)
	if err != nil {
		log.Fatal(err)
	}
	chip, err := i2c.New(part, memory, nil)
	if err != nil {
		log.Fatal(err)
	}

	// What the emulated bus does when the guest writes two bytes at 0x10. An
	// error is a byte that isn't acknowledged.
	for _, step := range []func() error{
		func() error { return chip.Start(0x50, false) },
		func() error { return chip.WriteByte(0x10) },
		func() error { return chip.WriteByte('h') },
		func() error { return chip.WriteByte('i') },
		chip.Stop, // returns when the bytes are durable
	} {
		if err := step(); err != nil {
			log.Fatal(err)
		}
	}
	stored, err := s.Get("i2c/8-0050/eeprom")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes, %q at 0x10\n", len(stored), stored[0x10:0x12])
	// Output: 256 bytes, "hi" at 0x10
}
