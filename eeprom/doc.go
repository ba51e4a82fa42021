// Package eeprom keeps the memory of emulated serial EEPROMs in a store. The
// chips themselves are models for authors of emulators, one package for each
// bus:
//
//   - eeprom/i2c: 24C01 to 24CM02
//   - eeprom/microwire: 93C46 to 93C86
//   - eeprom/spi: 25010 to 25M02
//
// A model is driven as the bus drives the chip, and answers as the data sheet
// says. It has no clock: a write cycle takes as long as the commit.
//
// # What a guest may rely on
//
// A write that the chip shows as complete is durable: it is one commit of the
// store, whole or not there at all, also where the data sheet would allow a
// power cut to leave a page half written. Until then the chip is busy, as in
// its write cycle: by default the call that ends the instruction (Stop, the
// falling CS, Deselect) returns when the commit does, and with Options.Async at
// once. A commit that fails is never shown as done: the chip stays busy until
// PowerCycle, and the guest's driver sees a write that times out.
//
// Drivers have limits of their own. Linux's at24 and at25 give up on a chip that
// is busy for more than 25 ms, and its eeprom_93xx46 doesn't ask, and waits 6 ms:
// with a slow medium, let the guest's clock stand still meanwhile, as it does
// without Async if the bus is emulated in the virtual CPU's thread.
//
// Models keep no copy of the memory, beyond some bytes that are read ahead
// within one transfer.
//
// # Reverts
//
// Loading a snapshot underneath (nvstore.ErrReverted) is to a chip what a power
// cut is. A write cycle that it interrupts doesn't happen. At the next start
// condition, or when the chip is next selected, its address counter and latches
// are as after power-on, and its content is the snapshot's. An emulator that
// restores a machine's volatile state with the snapshot calls PowerCycle, as it
// would for any chip whose latches it doesn't save.
package eeprom
