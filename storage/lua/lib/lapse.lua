-- What lapses because nobody renewed it. While this server is away nobody can renew, so that time doesn't count: the
-- supervisor's pulse tells that the farm could speak, and time stands still a little after the last one. The next
-- one makes good what was missed. A farm without a pulse goes by the clock.

local PULSE_MS = 3000

-- Return the milliseconds by which leases, and drivers that should be there, are judged.
local function lapse_ms(prefix, now)
  local pulse = redis.call('GET', prefix .. ':pulse')
  return pulse and math.min(now, tonumber(pulse) + PULSE_MS) or now
end
