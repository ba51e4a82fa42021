package nvstore_test

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/nvstore"
)

// tempDir is where an example keeps its images.
func tempDir() string {
	dir, err := os.MkdirTemp("", "nvstore")
	if err != nil {
		log.Fatal(err)
	}
	return dir
}

// temp is a new store, and what removes it again.
func temp() (*nvstore.Store, func()) {
	dir := tempDir()
	s, err := nvstore.Create(filepath.Join(dir, "vm.qcow2"), nil)
	if err != nil {
		log.Fatal(err)
	}
	return s, func() {
		s.Close()
		os.RemoveAll(dir)
	}
}

// A new qcow2 image with a store in it. The file appears when it is whole.
func ExampleCreate() {
	dir := tempDir()
	defer os.RemoveAll(dir)

	s, err := nvstore.Create(filepath.Join(dir, "vm.qcow2"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()

	// When Put returns, the blob is durable.
	err = s.Put(nvstore.TPMPermanent, []byte("the TPM's state"), &nvstore.Meta{Writer: "swtpm 0.7.1"})
	if err != nil {
		log.Fatal(err)
	}
	e, err := s.Stat(nvstore.TPMPermanent)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s has %d bytes, written by %s\n", e.Name, e.Size, e.Writer)
	// Output: tpm/permanent has 15 bytes, written by swtpm 0.7.1
}

// A store sealed with a passphrase: nothing opens it without, and a store that
// isn't sealed isn't taken for it.
func ExampleCreate_sealed() {
	dir := tempDir()
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "vm.qcow2")

	key, err := keyslot.Passphrase([]byte("correct horse battery staple"))
	if err != nil {
		log.Fatal(err)
	}
	s, err := nvstore.Create(path, &nvstore.CreateOptions{
		Key: key,
		KDF: kdf.MinArgon2id(), // for a quick example; leave it out
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := s.Put("uefi/vars", []byte("secret"), nil); err != nil {
		log.Fatal(err)
	}
	s.Close()

	_, err = nvstore.Open(path, nil)
	fmt.Println("without:", errors.Is(err, nvstore.ErrKey))
	s, err = nvstore.Open(path, &nvstore.Options{Key: key})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	p, err := s.Get("uefi/vars")
	fmt.Printf("with: %s, %v\n", p, err)
	// Output:
	// without: true
	// with: secret, <nil>
}

// Locations name an image, a machine in a Pebble folder, or a stack as in
// QEMU's --image-opts: here the last 32 MiB of a disk, which its guest never
// sees.
func ExampleOpen() {
	dir := tempDir()
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		log.Fatal(err)
	}
	if err := os.Truncate(disk, 1<<30); err != nil {
		log.Fatal(err)
	}

	location := "driver=raw,offset=992M,size=32M,file.driver=file,file.filename=" + disk
	s, err := nvstore.Create(location, &nvstore.CreateOptions{Existing: true})
	if err != nil {
		log.Fatal(err)
	}
	s.Close()

	s, err = nvstore.Open(location, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	info, err := s.Info()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Size>>20, "MiB, sealed:", info.Sealed)
	// Output: 32 MiB, sealed: false
}

// Several blobs change together, or none does.
func ExampleStore_Update() {
	s, done := temp()
	defer done()

	err := s.Update(func(tx *nvstore.Tx) error {
		if err := tx.Put(nvstore.TPMPermanent, []byte("permanent"), nil); err != nil {
			return err
		}
		return tx.Put(nvstore.TPMVolatile, []byte("volatile"), nil)
	})
	fmt.Println(err)

	err = s.Update(func(tx *nvstore.Tx) error {
		if err := tx.Delete(nvstore.TPMVolatile); err != nil {
			return err
		}
		return errors.New("power button held")
	})
	fmt.Println(err)

	entries, err := s.List("tpm/")
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range entries {
		fmt.Println(e.Name, e.Size)
	}
	// Output:
	// <nil>
	// power button held
	// tpm/permanent 9
	// tpm/volatile 8
}

// What View reads stands still, whatever is written meanwhile.
func ExampleStore_View() {
	s, done := temp()
	defer done()
	for _, name := range []string{"spd/0", "spd/1", "fru/baseboard"} {
		meta := &nvstore.Meta{Type: "eeprom", Attributes: []blobdir.Attribute{{Key: "slot", Value: name}}}
		if err := s.Put(name, make([]byte, 512), meta); err != nil {
			log.Fatal(err)
		}
	}

	err := s.View(func(tx *nvstore.Tx) error {
		for e, err := range tx.List("spd/") {
			if err != nil {
				return err
			}
			first := make([]byte, 16)
			if _, err := tx.ReadAt(e.Name, first, 0); err != nil {
				return err
			}
			fmt.Println(e.Name, e.Attributes[0].Value, first[0])
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// spd/0 spd/0 0
	// spd/1 spd/1 0
}

// A device model reads and writes its memory, and syncs where its hardware
// would have finished a write cycle.
func ExampleStore_Blob() {
	s, done := temp()
	defer done()

	eeprom, err := s.Blob("i2c/8-0050/eeprom", &nvstore.Meta{Type: "24c02"})
	if err != nil {
		log.Fatal(err)
	}
	defer eeprom.Close()
	if err := eeprom.Truncate(256); err != nil {
		log.Fatal(err)
	}
	if _, err := eeprom.WriteAt([]byte("MAC"), 0xfa); err != nil {
		log.Fatal(err)
	}
	switch err := eeprom.Sync(); {
	case errors.Is(err, nvstore.ErrReverted):
		fmt.Println("a snapshot was loaded: reset the device")
	case err != nil:
		log.Fatal(err)
	}

	p := make([]byte, 6)
	n, err := eeprom.ReadAt(p, 0xfa)
	fmt.Printf("%q %v, %d bytes in all\n", p[:n], err, eeprom.Size())
	// Output: "MAC\x00\x00\x00" <nil>, 256 bytes in all
}

// A live extent: a device that writes to its range of the image itself.
func ExampleStore_Attach() {
	s, done := temp()
	defer done()
	err := s.Update(func(tx *nvstore.Tx) error { return tx.CreateLive("spi/0/flash", 64<<10, nil) })
	if err != nil {
		log.Fatal(err)
	}
	// The machine starts.
	if err := s.Attach("spi/0/flash"); err != nil {
		log.Fatal(err)
	}
	e, err := s.Stat("spi/0/flash")
	if err != nil {
		log.Fatal(err)
	}
	flash, err := image.Window(s.Dir().Device(), e.Offset, e.Size)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := flash.WriteAt([]byte("by the machine"), 0x100); err != nil {
		log.Fatal(err)
	}
	_, err = s.Get("spi/0/flash")
	fmt.Println(err)
	// It is off.
	if err := s.Detach("spi/0/flash"); err != nil {
		log.Fatal(err)
	}
	p, err := s.Get("spi/0/flash")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p[0x100:0x10e])
	// Output:
	// blob "spi/0/flash" is attached: an emulator may have it open
	// by the machine
}
