package live_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/machine/live"
)

// window is a node over some of the disk, which a device has.
const window = "driver=raw,node-name=w,file=nvstore-disk,offset=8388608,size=65536"

// Load refuses what a device wouldn't follow, before anything is changed, and
// where QEMU would hang for ever. README has the table of devices.
func TestLoadLooksAtDevices(t *testing.T) {
	const flash = `if=mtd,file=json:{"driver":"raw",,"file":"nvstore-disk",,"offset":8388608,,"size":131072}`
	for _, b := range []struct {
		name, binary string
		args         []string
		refused      bool
		stale        bool // may be said to be fine
	}{
		{"at24c-eeprom", "qemu-system-arm", []string{"-M", "ast2600-evb", "-blockdev", window,
			"-device", "at24c-eeprom,bus=aspeed.i2c.bus.3,address=0x50,rom-size=65536,drive=w"}, true, false},
		{"at24c-eeprom with an ID", "qemu-system-arm", []string{"-M", "ast2600-evb", "-blockdev", window,
			"-device", "at24c-eeprom,id=e,bus=aspeed.i2c.bus.3,address=0x50,rom-size=65536,drive=w"}, true, false},
		{"at24c-eeprom without a drive", "qemu-system-arm", []string{"-M", "ast2600-evb",
			"-device", "at24c-eeprom,bus=aspeed.i2c.bus.3,address=0x50,rom-size=65536"}, false, false},
		{"m25p80", "qemu-system-arm", []string{"-M", "ast2600-evb,fmc-model=m25p10", "-drive", flash}, true, true},
		{"m25p80 without a drive", "qemu-system-arm", []string{"-M", "ast2600-evb,fmc-model=m25p10"}, false, false},
		{"spapr-nvram", "qemu-system-ppc64", []string{"-M", "pseries", "-m", "256", "-blockdev", window,
			"-global", "spapr-nvram.drive=w"}, false, false},
	} {
		t.Run(b.name, func(t *testing.T) {
			v := newVM(t)
			v.startOn(b.binary, b.args...)
			o := &live.Options{Timeout: 20 * time.Second}
			load := func() error {
				m, err := live.Connect(ctx, v.qmp, o)
				require.NoError(t, err)
				defer m.Close()
				err = m.Load(ctx, "a", nil)
				_, _, serr := m.Status(ctx)
				require.NoError(t, serr, "QEMU answers")
				return err
			}
			m, err := live.Connect(ctx, v.qmp, o)
			require.NoError(t, err)
			require.NoError(t, m.Save(ctx, "a", nil))
			require.NoError(t, m.Close())
			if err := load(); b.refused {
				require.ErrorIs(t, err, live.ErrDevice)
				t.Log(err)
			} else {
				require.NoError(t, err)
			}
			if o.Stale = true; b.stale {
				require.NoError(t, load())
			}
			v.quit()
		})
	}
}
